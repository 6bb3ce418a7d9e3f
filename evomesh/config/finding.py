"""Problems with keys of a config, and the nearest valid sizes to suggest."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConfigFinding:
    """A problem with some keys (resolved names); it is reported at the first of them."""

    keys: tuple[str, ...]
    found: str
    expected: str = ""
    fix: str = ""
    code: str = field(kw_only=True)


def nearest(
    value: int,
    divisors_of: int | None = None,
    multiples_of: int | None = None,
) -> str:
    """Return the valid sizes next to ``value``: divisors of one number or multiples of another."""
    if divisors_of is not None:
        candidates = _nearest_divisors(value, divisors_of)
    else:
        step = multiples_of or 1
        low = value // step * step
        candidates = [number for number in (low, low + step) if number > 0]
    return " or ".join(map(str, candidates))


def _nearest_divisors(value: int, dividend: int) -> list[int]:
    """Return the divisors on both sides of ``value``: 4 and 6 of 12 for 5, the largest one alone for 13."""
    below = []
    above = []
    for number in range(1, dividend + 1):
        if dividend % number:
            continue
        if number <= value:
            below.append(number)
        else:
            above.append(number)
    return below[-1:] + above[:1]
