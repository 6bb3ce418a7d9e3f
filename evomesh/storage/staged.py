"""Files written to a local folder first and uploaded from there (``async_upload_tmp_folder``).

Killed at any moment, what is left is a file in the local folder and at most an object
that no commit record names; the next start empties the folder.
"""

from __future__ import annotations

import errno
import os
import shutil
from typing import Any

from evomesh.storage.base import Storage, StorageError, StorageWriter, join

READ = 8 << 20  # bytes of the local file in memory at a time


class StagedWriter:
    """A file that is written to the upload folder and uploaded by ``finish``."""

    def __init__(self, storage: StagedStorage, path: str, local: str) -> None:
        self._storage = storage
        self._path = path
        self._local = local
        self._file = open(local, "xb", buffering=0)  # noqa: SIM115

    def write(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        while view:  # one call may take less than all of it
            count = self._file.write(view)
            view = view[count:]

    def finish(self) -> None:
        self._file.close()
        upload = self._storage.target.create(self._path)
        try:
            with open(self._local, "rb") as file:
                while data := file.read(READ):
                    upload.write(data)
            upload.finish()
        finally:
            upload.abort()
        os.unlink(self._local)

    def abort(self) -> None:
        self._file.close()
        if os.path.exists(self._local):
            os.unlink(self._local)


class StagedStorage:
    """A storage whose new files are made in a local folder first.

    Args:
        target: where the files go in the end.
        folder: local; this process owns a subfolder of it.
        name: of the subfolder, so that ranks on one machine do not meet.
    """

    def __init__(self, target: Storage, folder: str, name: str) -> None:
        self.target = target
        self._folder = join(folder, name)
        # Leftovers of a killed run: never committed.
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            os.makedirs(self._folder, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"{error.strerror}",
                where=self._folder,
                fix="set async_upload_tmp_folder",
                code="EVO-CKPT-012",
            ) from None

    def create(self, path: str) -> StorageWriter:
        if self.target.exists(path):
            raise FileExistsError(errno.EEXIST, "the object exists", path)
        return StagedWriter(self, path, join(self._folder, path.replace("/", "_")))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


def staged(storage: Storage, folder: str, name: str) -> Storage:
    """Return a storage that makes its new files in ``folder`` first if it is remote.

    A local one is returned as it is.
    """
    return StagedStorage(storage, folder, name) if storage.remote else storage
