"""Say in words how a token file differs from what its inputs would give now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evomesh.data.prepare.conversations import ChatOptions
from evomesh.data.prepare.tokenize import TextOptions, describe_sources
from evomesh.data.records.source_files import SourceFile
from evomesh.data.tokenizer import Tokenizer

NAMES = {"schema": "format", "template": "chat template"}  # as users know the options


def changes_since(
    record: Mapping[str, Any],
    files: list[SourceFile],
    tokenizer: Tokenizer,
    options: ChatOptions | TextOptions,
) -> list[str]:
    """Return in words what makes a token file another one than its inputs would give now; [] for none.

    Args:
        record: the fingerprint of the token file.
        files: the sources as they are now; all of them are hashed, unless their sizes tell enough.
        options: those with which they would be tokenized.
    """
    changes = _option_changes(record.get("options", {}), options)
    if record.get("tokenizer_hash") != tokenizer.hash:
        changes.append(f"the tokenizer {tokenizer.path} is another one")
    changes += _source_changes(record.get("sources", []), files)
    return changes


def _option_changes(
    recorded: Mapping[str, Any], options: ChatOptions | TextOptions
) -> list[str]:
    now = asdict(options)
    # A text file has none of the options of conversations, and the reverse.
    if ("schema" in recorded) != ("schema" in now):
        before = recorded.get("schema", "text")
        return [f"format {before} -> {now.get('schema', 'text')}"]
    changes = []
    for key, value in now.items():
        new = list(value) if isinstance(value, tuple) else value
        old = recorded.get(key, new)
        if old != new:
            changes.append(f"{NAMES.get(key, key)} {old} -> {new}")
    return changes


def _source_changes(
    recorded: list[Mapping[str, Any]], files: list[SourceFile]
) -> list[str]:
    distinct = dict.fromkeys(file.path for file in files)
    paths = list(distinct)
    names = [path.name for path in paths]
    known_names = _column(recorded, "file")
    if names != known_names:
        return [f"the files {known_names} -> {names}"]
    sizes = [path.stat().st_size for path in paths]
    other = _differing(paths, sizes, _column(recorded, "bytes"))
    if not other:
        found = describe_sources(files)
        hashes = _column(found, "sha256")
        known_hashes = _column(recorded, "sha256")
        other = _differing(paths, hashes, known_hashes)
    return [f"{path} has another content" for path in other]


def _column(sources: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [source.get(key) for source in sources]


def _differing(
    paths: Sequence[Path], now: Sequence[Any], before: Sequence[Any]
) -> list[Path]:
    """Return the paths whose two values differ."""
    rows = zip(paths, now, before, strict=True)
    return [path for path, new, old in rows if new != old]
