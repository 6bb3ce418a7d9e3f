"""What a checkpoint needs from the place where its bytes lie.

Every byte of a checkpoint, read or written, goes through a ``Storage``. Tests put a fault layer in its place.
Paths are plain strings with ``/`` between folders; ``urls.py`` turns what a user types into a storage and a path.
"""

from __future__ import annotations

from typing import Protocol

from evomesh.errors import UserError


class StorageError(UserError):
    """The store refused or failed: says which path and why. One that is down has the exit code of a restart."""


class LockTakenError(StorageError):
    """Another live process holds the lock; ``holder`` is the text it left."""

    def __init__(self, path: str, holder: str) -> None:
        self.holder = holder
        super().__init__(
            f"another live job writes here: {holder}",
            where=path,
            expected="one writer at a time",
            fix="stop that job, or give this one its own save_ckpt_folder",
        )


class StorageWriter(Protocol):
    """A new file being written; nobody may rely on it before ``finish`` has returned."""

    def write(self, data: memoryview | bytes) -> None: ...

    def finish(self) -> None:
        """Makes the content durable and closes the file."""

    def abort(self) -> None:
        """Closes without any promise; never raises."""


class StorageReader(Protocol):
    """An open file."""

    def expect(self, ranges: list[tuple[int, int]]) -> None:
        """Announces the (start, stop) byte ranges that will be read, in this order."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``start``; ``EOFError`` when the file ends before."""

    def close(self) -> None: ...


class StorageLock(Protocol):
    """Held until ``release`` or the end of the process, however it ends."""

    def release(self) -> None: ...


class Storage(Protocol):
    """Files in folders. A folder of an object store exists as soon as a file in it does."""

    remote: bool  # reads are expensive to start: merge neighbours

    def make_folder(self, folder: str) -> None:
        """Makes the folder and what lies above it; an existing one is fine."""

    def create(self, path: str) -> StorageWriter:
        """Starts a new file; ``FileExistsError`` when there is one."""

    def publish(self, path: str, data: bytes, token: str) -> None:
        """Makes a whole small file appear at once and durably; ``FileExistsError`` when there is one.

        ``token`` names the writer: the temporary file of one never collides with that of another.
        """

    def sync(self, folder: str) -> None:
        """Makes the names in the folder durable."""

    def open(self, path: str) -> StorageReader: ...

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes: ...

    def size(self, path: str) -> int:
        """In bytes; ``FileNotFoundError`` when absent."""

    def exists(self, path: str) -> bool:
        """Return whether the name is taken: on a disk by whatever it is, in an object store by an object.

        Raises:
            OSError: nobody may look.
        """

    def is_link(self, path: str) -> bool:
        """Return whether a file or folder is a symbolic link; an object store has none."""

    def list(self, folder: str) -> list[str]:
        """Sorted names in the folder, those of folders with a ``/`` behind; [] when it is absent."""

    def delete(self, path: str) -> None:
        """Deletes a file; an absent one is fine."""

    def delete_folder(self, folder: str) -> None:
        """Deletes an empty folder; an absent one is fine."""

    def free_bytes(self, folder: str) -> int | None:
        """Space left for this user, None when there is no known limit."""

    def lock(self, path: str, holder: str) -> StorageLock:
        """Takes the lock file and leaves ``holder`` in it, or raises ``Held``."""


def join(*parts: str) -> str:
    """``a/b/c`` from its parts, without doubled slashes."""
    head, *tail = (part for part in parts if part)
    return "/".join([head.rstrip("/") or ("" if tail else "/"), *(part.strip("/") for part in tail)])
