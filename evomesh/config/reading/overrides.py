"""``--set section.key=value``: parsing, and putting the value where a config file would have put it."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomesh.errors import ConfigError, UserError

WORDS = {
    "inf": math.inf,
    "-inf": -math.inf,
    "nan": math.nan,
    "true": True,
    "false": False,
    "none": None,
}


@dataclass(frozen=True)
class Override:
    """One ``--set``: keys from the top-level name down, and the value."""

    keys: tuple[str, ...]
    value: Any

    @property
    def dotted(self) -> str:
        return ".".join(self.keys)


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Parse ``["data.seq_len=512", "JOB_NAME=x"]``; values are Python literals, anything else is a string.

    Raises:
        ConfigError: without ``=``, or a key that is not dotted names. All of them at once.
    """
    problems = []
    out = []
    for text in texts:
        key, equals, value = text.partition("=")
        keys = tuple(part.strip() for part in key.split("."))
        if not equals or not all(part.isidentifier() for part in keys):
            problems.append(
                UserError(
                    f"cannot be read: {text!r}",
                    where="--set",
                    expected="section.key=value, such as --set data.seq_len=512 or --set JOB_NAME=test",
                    code="EVO-CONFIG-006",
                )
            )
            continue
        out.append(Override(keys, parse_value(value.strip())))
    if problems:
        raise ConfigError(problems, path="--set")
    return out


def parse_value(text: str) -> Any:
    """Parse Python literals, ``dict(a=1)``, ``inf``, ``true``/``false``/``none``; else the text itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return _literal_value(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def _literal_value(node: ast.expr) -> Any:
    """Evaluate a literal, ``dict(key=literal)`` or ``float("...")``; nothing else is ever called."""
    if isinstance(node, ast.List):
        return [_literal_value(item) for item in node.elts]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call_value(node, node.func.id)
    return ast.literal_eval(node)


def _call_value(node: ast.Call, function: str) -> Any:
    """Evaluate ``dict(key=literal)`` or ``float("...")``."""
    values = {}
    for keyword in node.keywords:
        values[keyword.arg] = _literal_value(keyword.value)
    arguments = node.args
    # `dict(**other)` is a keyword without a name.
    has_names_only = not arguments and None not in values
    if function == "dict" and has_names_only:
        return values
    if function == "float" and len(arguments) == 1:
        text = ast.literal_eval(arguments[0])
        return float(text)
    raise ValueError("a call")


def apply_overrides(
    namespace: dict[str, Any], overrides: Sequence[Override], *, create: bool = False
) -> None:
    """Put each override into ``namespace``; those whose top-level name is absent wait, unless ``create``."""
    for override in overrides:
        top = override.keys[0]
        if top in namespace or create:
            namespace[top] = _with_value_at(
                namespace.get(top), override.keys[1:], override.value
            )


def _with_value_at(old: Any, keys: tuple[str, ...], value: Any) -> Any:
    """Return ``old`` with ``value`` at ``keys``; nothing is changed in place."""
    if not keys:
        # The int form of a parallel size over its dict form sets the size only: the
        # mode stays.
        has_size = isinstance(old, dict) and "size" in old
        if has_size and _is_int(value):
            return {**old, "size": value}
        return value
    first, *below = keys
    copy = _as_dict(old)
    old_below = copy.get(first)
    copy[first] = _with_value_at(old_below, tuple(below), value)
    return copy


def _as_dict(value: Any) -> dict[str, Any]:
    """Return a value in the form that further keys can be put into."""
    if isinstance(value, Mapping):
        return dict(value)
    if _is_int(value):
        return {"size": value}  # the int form of a parallel size
    if isinstance(value, str):
        return {"path": value}  # the string form of load_ckpt_folder
    return {}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
