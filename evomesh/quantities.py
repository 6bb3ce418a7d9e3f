"""Numbers of things, and sizes in bytes, as words of a message."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def counted(number: float, noun: str, form: str = ",") -> str:
    """Return a number and a noun, in the plural where it needs one: "1 batch", "2 batches".

    Args:
        form: of the number, as ``format`` has it.
    """
    shown = format(number, form)
    if number == 1:
        return f"{shown} {noun}"
    ending = "es" if noun.endswith(("tch", "s", "x")) else "s"
    return f"{shown} {noun}{ending}"


def readable(size: float, digits: int = 1, least: float = 1) -> str:
    """Return ``1.5 GiB`` for a number of bytes.

    Args:
        digits: after the decimal point.
        least: the smallest number before a unit; 0.1 gives "0.50 GiB" rather than "512.00 MiB", so that the sizes of a
            table share a unit.
    """
    unit = 0
    while size >= 1024 * least and unit < len(UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.{digits if unit else 0}f} {UNITS[unit]}"
