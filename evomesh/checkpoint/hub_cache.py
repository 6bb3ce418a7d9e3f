"""Find a model folder by its path, or by its hub id in the local cache of the Hugging Face tools."""

from __future__ import annotations

import os
from pathlib import Path

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.user import expand_home
from evomesh.storage.urls import split_url


def local_folder(url: str) -> Path:
    """Return the local folder that ``url`` names: a path, or the id of a hub model in the local cache.

    Raises:
        CheckpointError: neither of them, or a URL of a remote store.
    """
    scheme, path = split_url(url)
    if scheme != "local":
        raise CheckpointError(
            f"{url!r} is not on a local disk",
            expected="a local folder",
            fix="copy the model folder to a local disk first",
        )
    folder = expand_home(path)
    if folder.is_dir():
        return folder
    cached = cached_model(path)
    if cached is not None:
        return cached
    raise CheckpointError(
        f"{url!r} is neither an existing folder nor a model in the local Hugging Face cache ({cache_folder()})",
        fix="give an existing folder, or download the model into the cache first",
    )


def cache_folder() -> Path:
    """Return the folder into which the hub's own tools download models."""
    home = expand_home(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def cached_model(name: str) -> Path | None:
    """Return the cached folder of the main revision of hub model ``name`` ("owner/model"), None if it is not cached."""
    model = cache_folder() / f"models--{name.replace('/', '--')}"
    main = model / "refs" / "main"
    if not main.is_file():
        return None
    snapshot = model / "snapshots" / main.read_text().strip()
    return snapshot if snapshot.is_dir() else None


def hub_model(url: str) -> str:
    """Return the cached folder of the hub model that ``url`` names ("owner/model"), "" if it names no such model."""
    scheme, name = split_url(url)
    if scheme != "local" or name.count("/") != 1:
        return ""
    cached = cached_model(name)
    return str(cached) if cached else ""
