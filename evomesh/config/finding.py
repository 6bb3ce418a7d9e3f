"""A problem with some keys of a config, and the nearest valid sizes."""

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
        valid = [n for n in range(1, divisors_of + 1) if divisors_of % n == 0]
        below, above = [n for n in valid if n <= value], [n for n in valid if n > value]
        return " or ".join(str(n) for n in (*below[-1:], *above[:1]))
    step = multiples_of or 1
    low = value // step * step
    return " or ".join(str(n) for n in (low, low + step) if n > 0)
