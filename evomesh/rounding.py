"""Rounding of sizes."""

from __future__ import annotations


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less than ``number``; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
