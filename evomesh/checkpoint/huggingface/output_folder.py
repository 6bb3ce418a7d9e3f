"""Write an export to a folder that appears complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.user import expand_home
from evomesh.quantities import readable
from evomesh.storage.base import Storage, join
from evomesh.storage.new_folders import create_folder, remove_empty
from evomesh.storage.urls import open_storage, split_url

BLOCK = 8 << 20  # bytes read at a time while copying


@contextmanager
def new_folder(target: str, needed: int) -> Iterator[Path]:
    """Yield a local folder to fill.

    Without an error it becomes ``target``, on disk or in a store; else it is deleted.

    Args:
        needed: bytes that will be written.

    Raises:
        CheckpointError: the target is in use, the disk is too full, or it cannot be
            written.
    """
    scheme, _ = split_url(target)
    local = scheme == "local"
    storage, path = open_storage(target)
    local_path = expand_home(path) if local else Path(tempfile.gettempdir(), "export")
    _refuse_in_use(local_path if local else None, storage, path, target)
    _refuse_full(local_path.absolute().parent, needed, target)
    # Beside the target, so on the same file system: there a rename takes one step, and
    # no reader sees half a folder. A killed export leaves this hidden folder only.
    work = local_path.parent / f".{local_path.name}.{secrets.token_hex(4)}.tmp"
    new_folders: list[Path] = []
    try:
        new_folders = create_folder(work)
        yield work
        if local:
            _sync(work)
            if local_path.is_dir():
                local_path.rmdir()  # empty, as checked
            os.rename(work, local_path)
            _sync_name(local_path.parent)
        else:
            _upload(storage, work, path)
    except OSError as error:
        raise CheckpointError(
            f"cannot be written: {error.strerror or error}",
            where=target,
            code="EVO-HF-005",
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        remove_empty([folder for folder in new_folders if folder != work])


def _sync(folder: Path) -> None:
    """Make all files below a folder durable.

    Else a power failure could leave the name of the folder and not the weights in it.
    """
    for path in sorted(folder.rglob("*")):
        _sync_name(path)
    _sync_name(folder)


def _sync_name(path: Path) -> None:
    """Make one file, or the names in one folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_in_use(
    local_path: Path | None, storage: Storage, path: str, target: str
) -> None:
    if local_path is None:
        in_use = bool(storage.list(path))
    elif local_path.is_dir():
        in_use = any(local_path.iterdir())
    else:
        in_use = local_path.exists()
    if in_use:
        raise CheckpointError(
            "exists and is not empty",
            where=target,
            fix="give a new folder, or delete this one",
            code="EVO-HF-005",
        )


def _refuse_full(folder: Path, needed: int, target: str) -> None:
    near = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(near).free
    if free < needed:
        raise CheckpointError(
            f"the export needs {readable(needed)}, {near} has {readable(free)} free",
            where=target,
            fix="free space, or export a smaller --dtype",
            code="EVO-HF-005",
        )


def _upload(storage: Storage, work: Path, target: str) -> None:
    """Upload every file, config.json last: without it no reader takes the folder for a model."""
    files = sorted(
        work.iterdir(), key=lambda file: (file.name == "config.json", file.name)
    )
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
