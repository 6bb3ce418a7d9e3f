"""The interface between checkpoints and the place where their bytes are.

Every byte of a checkpoint, read or written, goes through a ``Storage``. Tests put a
faulty one in its place. Paths are plain strings with ``/`` between folders; ``urls.py``
turns what a user types into a storage and a path.
"""

from __future__ import annotations

from typing import Protocol

from evomesh.errors import UserError


class StorageError(UserError):
    """The store refused or failed: says which path and why.

    One that is down has the exit code of a restart.
    """


class LockTakenError(StorageError):
    """Another live process holds the lock; ``holder`` is the text it left."""

    def __init__(self, path: str, holder: str) -> None:
        self.holder = holder
        super().__init__(
            f"another live job writes here: {holder}",
            where=path,
            expected="one writer at a time",
            fix="stop that job, or give this one another save_ckpt_folder",
            code="EVO-CKPT-011",
        )


class StorageWriter(Protocol):
    """A new file that is being written; nobody may rely on it before ``finish`` has returned."""

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes."""

    def finish(self) -> None:
        """Make the content durable and close the file."""

    def abort(self) -> None:
        """Close without any promise; never raises."""


class StorageReader(Protocol):
    """An open file."""

    def expect(self, ranges: list[tuple[int, int]]) -> None:
        """Announce the (start, stop) byte ranges that will be read, in this order."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``start``.

        Raises:
            EOFError: the file ends before.
        """

    def close(self) -> None:
        """Close the file."""


class StorageLock(Protocol):
    """Held until ``release`` or the end of the process, however it ends."""

    def check(self) -> None:
        """Make sure that this process still holds the lock.

        Raises:
            StorageError: another one took it over while this one hung.
        """

    def release(self) -> None:
        """Let the next writer in."""


class LockHeldElsewhere:
    """The lock that rank 0 holds, as the other ranks see it."""

    def check(self) -> None:
        return

    def release(self) -> None:
        return


class Storage(Protocol):
    """Files in folders. A folder of an object store exists as soon as a file in it does.

    Attributes:
        remote: reads are expensive to start, so adjacent ones are merged.
    """

    remote: bool

    def make_folder(self, folder: str) -> None:
        """Make the folder and those above it; an existing one is fine."""

    def create(self, path: str) -> StorageWriter:
        """Start a new file.

        Raises:
            FileExistsError: there is one.
        """

    def publish(self, path: str, data: bytes, token: str) -> None:
        """Make a whole small file appear at once and durably.

        Args:
            token: names the writer: the temporary file of one never collides with that
                of another.

        Raises:
            FileExistsError: there is one.
        """

    def sync(self, folder: str) -> None:
        """Make the names in the folder durable."""

    def open(self, path: str) -> StorageReader:
        """Open a file for reading; a pipe, a device or a socket is refused unopened."""

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Read ``length`` bytes from ``start``, by default to the end of the file."""

    def size(self, path: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            FileNotFoundError: there is none.
        """

    def exists(self, path: str) -> bool:
        """Return whether the name is taken.

        On a disk anything takes it, in an object store only an object.

        Raises:
            OSError: nobody may look.
        """

    def is_link(self, path: str) -> bool:
        """Return whether a file or folder is a symbolic link; an object store has none."""

    def list(self, folder: str) -> list[str]:
        """Return the sorted names in the folder, folders with a ``/`` at the end.

        [] when it is absent.
        """

    def delete(self, path: str) -> None:
        """Delete a file; an absent one is fine."""

    def delete_folder(self, folder: str) -> None:
        """Delete an empty folder; an absent one is fine."""

    def free_bytes(self, folder: str) -> int | None:
        """Return the space left for this user, None when there is no known limit."""

    def lock(self, path: str, holder: str) -> StorageLock:
        """Take the lock at ``path`` and leave the text ``holder`` there.

        Raises:
            LockTakenError: another process holds it.
        """


def join(*parts: str) -> str:
    """Return ``a/b/c`` from its parts, without doubled slashes."""
    head, *tail = (part for part in parts if part)
    first = head.rstrip("/") or ("" if tail else "/")
    return "/".join([first, *(part.strip("/") for part in tail)])
