"""Problems with keys of a config, and the nearest valid sizes to suggest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConfigFinding:
    """A problem with some keys (resolved names); it is reported at the first of them."""

    keys: tuple[str, ...]
    found: str
    expected: str = ""
    fix: str = ""


def nearest(value: int, divisors_of: int | None = None, multiples_of: int | None = None) -> str:
    """Return the valid sizes next to ``value``: divisors of one number or multiples of another."""
    if divisors_of is not None:
        divisors = [number for number in range(1, divisors_of + 1) if divisors_of % number == 0]
        below = [number for number in divisors if number <= value]
        above = [number for number in divisors if number > value]
        candidates = below[-1:] + above[:1]
    else:
        step = multiples_of or 1
        low = value // step * step
        candidates = [number for number in (low, low + step) if number > 0]
    return " or ".join(str(number) for number in candidates)
