"""``config_text``: a translated config as a file of ours, with the origin of every line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from evomesh.config.loader import LoadedConfig
from evomesh.config.reading.draft import leaves
from evomesh.config.reading.spellings import written_key

TEXTS = {"inf": 'float("inf")', "-inf": 'float("-inf")'}


def config_text(loaded: LoadedConfig) -> str:
    """Return a config file with every value that is not a default, the origin of each as a comment.

    What could not be carried over is listed at the end.
    """
    # 1. The values, as a tree of sections, and the origin of each.
    values: dict[str, Any] = {}
    comments: dict[str, str] = {}
    for resolved, value in leaves(loaded.config.model_dump()):
        key = written_key(resolved)
        origin = loaded.origins.get(key, "default")
        is_default = origin.startswith("default")
        if is_default or _is_translated_none(value, origin):
            continue
        comments[key] = origin
        path = key.split(".")
        _place(values, path, value)

    # 2. Plain names first, then the sections, each after an empty line.
    lines = [
        f'"""Written by `evomesh config translate {loaded.path}`; comments say where values come from."""'
    ]
    names = sorted(values, key=lambda name: isinstance(values[name], dict))
    for name in names:
        value = values[name]
        if isinstance(value, dict):
            lines.append("")
        assignment = _assignment(name, value, name, comments, indent="", end="")
        lines.extend(assignment)

    # 3. What a reader has to know beyond the values.
    if loaded.warnings:
        lines += ["", "# Not carried over, or to be known:"]
        for words in loaded.warnings:
            lines.append(f"# - {words}")
    text = "\n".join(lines)
    return f"{text}\n"


def _is_translated_none(value: Any, origin: str) -> bool:
    """Return whether XTuner's None was taken over, which is the default here too."""
    return value is None and origin.startswith("XTuner")


def _literal(value: Any) -> str:
    """Return a value as Python reads it, strings in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_literal, value))}]"
    return TEXTS.get(str(value), repr(value))


def _place(values: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        values = values.setdefault(part, {})
    values[parts[-1]] = value


def _assignment(
    name: str,
    value: Any,
    key: str,
    comments: Mapping[str, str],
    *,
    indent: str,
    end: str,
) -> Iterator[str]:
    """Yield the lines of ``name = value``, or in a section of ``name=value,``."""
    sign = "=" if indent else " = "
    if not isinstance(value, dict):
        yield f"{indent}{name}{sign}{_literal(value)}{end}  # {comments[key]}"
        return
    yield f"{indent}{name}{sign}dict("
    for inner, item in value.items():
        yield from _assignment(
            inner, item, f"{key}.{inner}", comments, indent=indent + "    ", end=","
        )
    yield f"{indent}){end}"
