"""Tell by its keys which form of a conversation a record has."""

from __future__ import annotations

from typing import Any

# Formats of `evomesh tokenize --format`, and the keys that a record of each has.
FORMAT_KEYS = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("xtuner", ("conversation",)),
    ("alpaca", ("instruction", "output")),
)


def chat_format(value: Any) -> str:
    """Return the format of a record that is a conversation by its keys; "" for any other."""
    if not isinstance(value, dict):
        return ""
    for name, keys in FORMAT_KEYS:
        if all(key in value for key in keys):
            return name
    return ""
