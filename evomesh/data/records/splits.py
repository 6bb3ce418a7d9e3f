"""Tell which files of a Hugging Face style folder are training data and which are held out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from evomesh.errors import UserError

ALL_SPLITS = "all"  # the name that selects every file, whatever split it belongs to
HELD_OUT_KINDS = ("validation", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
    "evaluation": "test",
    "testing": "test",
}
# SPLIT-00000-of-00004.parquet, inside data/.
SHARD_NAME = re.compile(r"^(\w+(?:\.\w+)*)-\d{5,}-of-\d{5,}")


def read_saved_splits(root: Path) -> dict[Path, list[str]]:
    """Return the split names of each folder below ``root`` that ``datasets`` saved; each split is a subfolder."""
    saved = {}
    for path in sorted(root.rglob("dataset_dict.json")):
        # A file of another kind may have this name: it lists no splits.
        try:
            content = json.loads(path.read_bytes())
            names = content["splits"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        folder = path.parent.relative_to(root)
        saved[folder] = [str(name) for name in names]
    return saved


def split_of(name: Path, saved: dict[Path, list[str]]) -> str:
    """Return the split that a file's path names: "train", "validation", "test", a custom name, or "" for none."""
    # 1. A folder that `datasets` saved lists its splits.
    for folder, splits in saved.items():
        if name.is_relative_to(folder):
            first = name.relative_to(folder).parts[0]
            if first in splits:
                return first
    # 2. Hugging Face repositories name the shards of a split after it.
    shard = SHARD_NAME.match(name.name)
    if shard and "data" in name.parts[:-1]:
        return usual_name(shard[1])
    # 3. Otherwise a word in the path decides, the innermost first.
    for part in reversed(name.parts):
        kind = split_kind(part)
        if kind:
            return kind
    return ""


def split_kind(text: str) -> str:
    """Return "validation", "test" or "train", the first of these that a word in ``text`` means; "" for none."""
    words = re.split(r"[^a-z]+", text.lower())
    kinds = {SPLIT_WORDS.get(word, "") for word in words}
    return next((kind for kind in (*HELD_OUT_KINDS, "train") if kind in kinds), "")


def choose_split(
    splits: Sequence[str], wanted: str | None, purpose: str, folder: Path
) -> str:
    """Return the split to read, out of those that a folder has ("" for files that name none).

    Args:
        wanted: ``data.split_name`` or ``data.valid_split_name``.
        purpose: "train" or "valid".
        folder: for the message.

    Raises:
        UserError: there is no such split, or the choice is ambiguous; lists the splits.
    """
    key = "data.split_name" if purpose == "train" else "data.valid_split_name"
    names = [name for name in splits if name]
    if wanted is not None:
        if wanted == "train" and _is_unnamed_training(splits):
            return ""
        return _find_split(names, wanted, key, folder)
    candidates = _candidates(splits, purpose)
    if len(candidates) == 1:
        return candidates[0]

    raise _ambiguous(candidates, names, key, folder)


def _ambiguous(
    candidates: Sequence[str], names: Sequence[str], key: str, folder: Path
) -> UserError:
    """Return the error for a folder with several candidates, or with none: it has only held-out files."""
    if candidates:
        listed = ", ".join(name or "files that name no split" for name in candidates)
        found = f"{folder} has several candidate splits: {listed}"
    else:
        found = f"{folder} has only held-out files"
    examples = [name for name in (*candidates, *names) if name]
    example = examples[0] if examples else ALL_SPLITS
    return UserError(
        found,
        where=key,
        expected=f"one of {', '.join(names)}, or {ALL_SPLITS!r} for every file",
        fix=f"choose one: {key}={example!r}",
        code="EVO-DATA-016",
    )


def usual_name(split: str) -> str:
    """Return "train", "validation" or "test" for a word that means one of them, else the name itself."""
    return SPLIT_WORDS.get(split.lower(), split)


def _is_unnamed_training(splits: Sequence[str]) -> bool:
    """Return whether the files that name no split are the training split, as ``datasets`` calls them."""
    return "" in splits and all(split_kind(name) != "train" for name in splits)


def _find_split(names: Sequence[str], wanted: str, key: str, folder: Path) -> str:
    """Return the split that a user named, possibly by another word for it ("dev" for "validation")."""
    name = wanted if wanted in names else usual_name(wanted)
    if name in names or wanted == ALL_SPLITS:
        return name
    choices = (
        f"one of {', '.join(names)}" if names else "none: no file's path names a split"
    )
    raise UserError(
        f"{folder} has no split {wanted!r}",
        where=key,
        expected=f"{choices}, or {ALL_SPLITS!r} for every file",
        code="EVO-DATA-016",
    )


def _candidates(splits: Sequence[str], purpose: str) -> list[str]:
    """Return the splits that ``purpose`` can mean, of the first kind that the folder has any of."""
    # Best kind first. Files that name no split are training data where no split is named
    # so, and training data is validated on where nothing else is there.
    kinds = ["train", ""]
    if purpose == "valid":
        kinds = ["validation", "test", *kinds]
    for kind in kinds:
        found = [name for name in splits if split_kind(name) == kind]
        if found:
            return found
    return []
