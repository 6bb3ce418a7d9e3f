"""Find folders of the hub's local cache, into which its tools download models and datasets."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from pathlib import Path

from evomesh.config.user import expand_home
from evomesh.user_files import read_text

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SUGGESTED = 3
LISTED = 8


def cache_folder() -> Path:
    """Return the folder into which the hub's own tools download models."""
    home = expand_home(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def cached_model(name: str) -> Path | None:
    """Return the cached folder of the main revision of hub model ``name`` ("owner/model"), None if it is not cached."""
    return _cached_snapshot("models", name)


def cached_dataset(name: str) -> Path | None:
    """Return the cached folder of the main revision of hub dataset ``name``, None if it is not cached."""
    return _cached_snapshot("datasets", name)


def _cached_snapshot(kind: str, name: str) -> Path | None:
    repository = cache_folder() / f"{kind}--{name.replace('/', '--')}"
    main = repository / "refs" / "main"
    if not main.is_file():
        return None
    snapshot = repository / "snapshots" / read_text(main).strip()
    return snapshot if snapshot.is_dir() else None


def find_model_folder(name: str) -> Path | None:
    """Return the folder that a path or a hub id names, None if there is neither."""
    folder = expand_home(name.removeprefix("local:"))
    return folder if folder.is_dir() else cached_model(name)


def advice_on_missing(name: str, kind: str = "model", options: str = "") -> str:
    """Return the fix for a path or hub id of which there is neither: a similar folder, or the download.

    A name below a folder that exists is a path, and nothing to download: "checkpoints/mien".

    Args:
        options: of the command that downloads.
    """
    name = name.removeprefix("local:")
    folder = expand_home(name)
    parent = folder.parent
    beside = _folders_in(parent)
    near = difflib.get_close_matches(folder.name, beside, n=SUGGESTED)
    if near:
        similar = [str(parent / one) for one in near]
        return f"did you mean {' or '.join(similar)}?"
    hub_id = name
    if "/" not in name:
        hub_id = f"OWNER/{kind.upper()}"
    if HUB_ID.fullmatch(hub_id) and not _is_below_folder(name):
        return f"give an existing folder, or download the {kind} into the cache first: hf download {hub_id}{options}"
    listed = ", ".join(beside[:LISTED])
    return "give an existing folder" + (f"; {parent} has {listed}" if listed else "")


def _is_below_folder(name: str) -> bool:
    """Return whether a name has a slash, and what is before the last one is a folder."""
    parent, slash, _ = name.rpartition("/")
    return bool(slash) and Path(parent).is_dir()


def _folders_in(parent: Path) -> list[str]:
    """Return the names of the folders in a folder; none of one that cannot be listed."""
    names = []
    with contextlib.suppress(OSError):
        for entry in parent.iterdir():
            if entry.is_dir() and not entry.name.startswith("."):
                names.append(entry.name)
    return sorted(names)
