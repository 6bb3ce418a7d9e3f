"""Find folders of the hub's local cache, into which its tools download models and datasets."""

from __future__ import annotations

import os
from pathlib import Path

from evomesh.config.user import expand_home
from evomesh.user_files import read_text


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
