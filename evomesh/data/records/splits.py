"""Which files of a Hugging Face style folder are training data, and which are held out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from evomesh.errors import UserError

EVERY = "all"  # the name that takes every file, whatever split it belongs to
WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
         "dev": "validation", "eval": "validation", "test": "test", "testing": "test"}  # fmt: skip
SHARD = re.compile(r"^(\w+(?:\.\w+)*)-\d{5,}-of-\d{5,}")  # SPLIT-00000-of-00004.parquet, below data/


def read_split_folders(root: Path) -> dict[Path, list[str]]:
    """Folders below ``root`` that ``datasets`` saved with splits, and the names of these, which are their folders."""
    found = {}
    for path in sorted(root.rglob("dataset_dict.json")):
        try:
            names = json.loads(path.read_bytes())["splits"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found[path.parent.relative_to(root)] = [str(name) for name in names]
    return found


def split_of(name: Path, saved: dict[Path, list[str]]) -> str:
    """The split that a file's path says it belongs to: "train", "validation", "test", a name of its own, or ""."""
    for folder, splits in saved.items():
        if name.is_relative_to(folder) and (inside := name.relative_to(folder).parts)[0] in splits:
            return inside[0]
    shard = SHARD.match(name.name)
    if shard and "data" in name.parts[:-1]:
        return WORDS.get(shard[1].lower(), shard[1])
    for part in reversed(name.parts):
        if kind := kind_of(part):
            return kind
    return ""


def kind_of(text: str) -> str:
    """ "train", "validation" or "test" by the words in ``text``, held-out ones first; "" when none is among them."""
    kinds = {WORDS.get(word, "") for word in re.split(r"[^a-z]+", text.lower())}
    return next((kind for kind in ("validation", "test", "train") if kind in kinds), "")


def choose_split(splits: Sequence[str], wanted: str | None, use: str, folder: Path) -> str:
    """The split to read, out of those that a folder has ("" for files that name none).

    Args:
        wanted: ``data.split_name`` or ``data.valid_split_name``.
        use: "train" or "valid".
        folder: for the message.

    Raises:
        UserError: no such split, or several could be meant: names them.
    """
    key = "data.split_name" if use == "train" else "data.valid_split_name"
    names = [name for name in splits if name]
    if wanted is not None:
        known = wanted if wanted in names else WORDS.get(wanted.lower(), wanted)
        if known in names or wanted == EVERY:
            return known
        has = f"one of {', '.join(names)}" if names else "none: no file's path names a split"
        raise UserError(
            f"{folder} has no split {wanted!r}", where=key, expected=f"{has}, or {EVERY!r} for every file"
        )
    held = [name for name in splits if kind_of(name) in ("validation", "test")]
    training = [name for name in splits if kind_of(name) == "train"]
    other = [name for name in splits if name not in (*held, *training)]
    if use == "valid":
        validation = [name for name in held if kind_of(name) == "validation"]
        choices = validation or held or training or other
    else:
        choices = training or other
    if len(choices) == 1:
        return choices[0]
    found = ", ".join(name or "files without one" for name in choices or held)
    what = (
        f"{folder} has several splits that may be meant: {found}"
        if choices
        else f"{folder} has held-out files only"
    )
    raise UserError(
        what,
        where=key,
        expected=f"one of {', '.join(names)}, or {EVERY!r} for every file",
        fix=f"name it: {key}={next(iter([n for n in (*choices, *held) if n]), EVERY)!r}",
    )
