"""Find a model folder by its path, or by its hub id in the local cache of the Hugging Face tools."""

from __future__ import annotations

from pathlib import Path

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.hub_folders import advice_on_missing, cache_folder, cached_model
from evomesh.config.user import expand_home
from evomesh.storage.urls import open_storage, split_url


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
            code="EVO-HF-001",
        )
    folder = expand_home(path)
    if folder.is_dir():
        return folder
    cached = cached_model(path)
    if cached is not None:
        return cached
    raise CheckpointError(
        f"{url!r} is neither an existing folder nor a model in the local Hugging Face cache ({cache_folder()})",
        fix=advice_on_missing(path),
        code="EVO-HF-001",
    )


def hub_model(url: str) -> str:
    """Return the cached folder of the hub model that ``url`` names ("owner/model"), "" if it names no such model."""
    scheme, name = split_url(url)
    if scheme != "local" or name.count("/") != 1:
        return ""
    cached = cached_model(name)
    return str(cached) if cached else ""


def refuse_unknown_id(path: str) -> None:
    """Refuse a path to nothing that reads as the id of a hub model, OWNER/MODEL.

    Raises:
        CheckpointError: with the command that downloads the model.
    """
    storage, folder = open_storage(path)
    scheme, name = split_url(path)
    is_plain = scheme == "local" and name == path  # local:OWNER/MODEL is a folder
    looks_like_id = is_plain and folder.count("/") == 1
    if looks_like_id:
        # Beside other files it is a path with a typing error: "checkpoints/mien".
        parent = folder.split("/")[0]
        neighbors = storage.list(parent)
        if not neighbors:
            local_folder(path)
