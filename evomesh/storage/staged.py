"""Files written to a local folder first and uploaded from there (``async_upload_tmp_folder``).

Killed at any moment, what is left is a file in the local folder and at most an object that no commit record names; the
next start empties the folder.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from evomesh.storage.base import Storage, StorageError, StorageWriter, join

READ = 8 << 20


class StagedWriter:
    def __init__(self, storage: StagedStorage, path: str, local: str) -> None:
        self._storage, self._path, self._local = storage, path, local
        self._file = open(local, "xb", buffering=0)  # noqa: SIM115

    def write(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> None:
        self._file.close()
        upload = self._storage.behind.create(self._path)
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
    """The storage ``behind``, with new files made in ``folder`` first.

    Args:
        folder: local; this process owns a subfolder of it.
        name: of the subfolder, so that ranks on one machine do not meet.
    """

    def __init__(self, behind: Storage, folder: str, name: str) -> None:
        self.behind, self._folder = behind, join(folder, name)
        shutil.rmtree(self._folder, ignore_errors=True)  # leftovers of a killed run: never committed
        try:
            os.makedirs(self._folder, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"{error.strerror}", where=self._folder, fix="set async_upload_tmp_folder"
            ) from None

    def create(self, path: str) -> StorageWriter:
        if self.behind.exists(path):
            raise FileExistsError(17, "the object exists", path)
        return StagedWriter(self, path, join(self._folder, path.replace("/", "_")))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)


def staged(storage: Storage, folder: str, name: str) -> Storage:
    """``storage``, its new files made in ``folder`` first if it is far away."""
    return StagedStorage(storage, folder, name) if storage.remote else storage
