"""Where an export goes: a folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomesh.checkpoint.native.disk_space import readable
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.storage.base import Storage, join
from evomesh.storage.urls import open_storage, split_url

BLOCK = 8 << 20  # bytes read at a time while copying


@contextmanager
def new_folder(target: str, needed: int) -> Iterator[Path]:
    """A local folder to fill. Left without an error it becomes ``target``, on disk or in a store; else it vanishes.

    Args:
        needed: bytes that will be written.
    Raises:
        CheckpointError: the target is in use, has no room, or cannot be written.
    """
    local = split_url(target)[0] == "local"
    storage, path = open_storage(target)
    place = Path(path).expanduser() if local else Path(tempfile.gettempdir(), "export")
    _refuse(place if local else None, storage, path, target)
    _refuse_full(place.absolute().parent, needed, target)
    work = place.parent / f".{place.name}.{secrets.token_hex(4)}.tmp"
    try:
        work.mkdir(parents=True)
        yield work
        if local:
            if place.is_dir():
                place.rmdir()  # empty, as checked
            os.rename(work, place)
        else:
            _upload(storage, work, path)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", where=target) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse(place: Path | None, storage: Storage, path: str, target: str) -> None:
    taken = (
        place.exists() and (not place.is_dir() or any(place.iterdir())) if place else bool(storage.list(path))
    )
    if taken:
        raise CheckpointError(
            "exists and is not empty", where=target, fix="give a new folder, or delete this one"
        )


def _refuse_full(folder: Path, needed: int, target: str) -> None:
    near = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(near).free
    if free < needed:
        raise CheckpointError(
            f"the export needs {readable(needed)}, {near} has {readable(free)} free",
            where=target,
            fix="free space, or export a smaller --dtype",
        )


def _upload(storage: Storage, work: Path, target: str) -> None:
    """Copies every file; config.json, without which no reader takes the folder for a model, comes last."""
    files = sorted(work.iterdir(), key=lambda file: (file.name == "config.json", file.name))
    try:
        for file in files:
            writer = storage.create(join(target, file.name))
            try:
                with open(file, "rb") as source:
                    while block := source.read(BLOCK):
                        writer.write(block)
                writer.finish()
            finally:
                writer.abort()
    except BaseException:
        for file in files:
            storage.delete(join(target, file.name))
        raise
