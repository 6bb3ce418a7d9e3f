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
    problems, out = [], []
    for text in texts:
        key, equals, value = text.partition("=")
        keys = tuple(part.strip() for part in key.split("."))
        if not equals or not all(part.isidentifier() for part in keys):
            problems.append(
                UserError(
                    f"cannot be read: {text!r}",
                    where="--set",
                    expected="section.key=value, such as --set data.seq_len=512 or --set JOB_NAME=test",
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
    # `dict(**other)` is a keyword without a name.
    names = [keyword.arg for keyword in node.keywords]
    keywords_only = not node.args and None not in names
    if function == "dict" and keywords_only:
        values = [_literal_value(keyword.value) for keyword in node.keywords]
        return dict(zip(names, values, strict=True))
    if function == "float" and len(node.args) == 1:
        return float(ast.literal_eval(node.args[0]))
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
        keeps_dict = isinstance(old, dict) and "size" in old and _is_int(value)
        return {**old, "size": value} if keeps_dict else value
    if isinstance(old, Mapping):
        base = dict(old)
    elif _is_int(old):
        base = {"size": old}  # the int form of a parallel size
    elif isinstance(old, str):
        base = {"path": old}  # the string form of load_ckpt_folder
    else:
        base = {}
    base[keys[0]] = _with_value_at(base.get(keys[0]), keys[1:], value)
    return base


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
