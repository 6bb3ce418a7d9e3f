"""Encode values that JSON cannot express: NaN, infinities and bytes.

Checkpoints and ``config show --json`` tag such a value (``{"$float": "inf"}``), so that reading restores it.
``metrics.jsonl`` is read by other tools, whose ``float()`` understands plain words; see ``float_word``.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

PLAIN = str | bool | int | float | None  # JSON has them as they are


def encode_json(value: Any) -> Any:
    """Return a strict JSON value from which ``decode_json`` restores ``value``; tuples become lists.

    Raises:
        TypeError: a value that ``decode_json`` could not restore.
    """
    # 1. What JSON has no form for becomes an object with one key, which nothing else
    #    may begin with "$": inf is {"$float": "inf"}.
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if isinstance(value, bytes):
        text = base64.b64encode(value).decode()
        return {"$bytes": text}

    # 2. Everything else as it is.
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [encode_json(item) for item in value]
    if isinstance(value, Mapping):
        return _encode_mapping(value)
    kind = type(value).__name__
    raise TypeError(f"a {kind} cannot be stored as JSON: {value!r}")


def _encode_mapping(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    _check_keys(mapping)
    encoded = {}
    for key, value in mapping.items():
        encoded[key] = encode_json(value)
    return encoded


def decode_json(value: Any) -> Any:
    """Return the value that ``encode_json`` encoded, with lists in place of tuples."""
    if isinstance(value, list):
        return [decode_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"])
    return {key: decode_json(item) for key, item in value.items()}


def float_word(value: Any) -> Any:
    """Return "NaN", "Infinity" or "-Infinity" for a float that JSON cannot express, any other value as it is."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _check_keys(value: Mapping[Any, Any]) -> None:
    for key in value:
        if not isinstance(key, str) or key.startswith("$"):
            raise TypeError(
                f"the key {key!r} cannot be stored as JSON: it must be a string without a leading $"
            )
