"""Take typed values out of parsed JSON: a record with a right hash may still hold anything."""

from __future__ import annotations

from typing import Any

LARGEST = 2**63 - 1  # integer in a record


def integer(value: Any, name: str) -> int:
    """Return a count, size or position.

    Raises:
        TypeError: not an integer; ``True`` and 5.0 are none.
        ValueError: negative, or above ``LARGEST``.
    """
    if type(value) is not int:
        raise TypeError(f"{name} is {_shown(value)}, expected an integer")
    if not 0 <= value <= LARGEST:
        raise ValueError(f"{name} is {_shown(value)}, expected 0 to 2**63 - 1")
    return value


def integers(value: Any, name: str) -> tuple[int, ...]:
    """Return a list of counts as a tuple.

    Raises:
        TypeError, ValueError: not such a list.
    """
    return tuple(integer(item, name) for item in array(value, name))


def text(value: Any, name: str) -> str:
    """Return a string without control characters.

    Raises:
        TypeError, ValueError: not such a string.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_shown(value)}, expected text")
    if not value.isprintable():
        raise ValueError(f"{name} is {_shown(value)}, which holds control characters")
    return value


def array(value: Any, name: str) -> list[Any]:
    """Return a list.

    Raises:
        TypeError: not a list.
    """
    if not isinstance(value, list):
        raise TypeError(f"{name} is {_shown(value)}, expected a list")
    return value


def mapping(value: Any, name: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        TypeError: not an object.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {_shown(value)}, expected an object")
    return value


def flag(value: Any, name: str) -> bool:
    """Return a boolean.

    Raises:
        TypeError: not a boolean.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {_shown(value)}, expected true or false")
    return value


def _shown(value: Any) -> str:
    """Return the beginning of a value that may be huge, with control characters escaped."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:60]
