"""Files on a mounted file system, with the order of fsyncs that a crash cannot break."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat

from evomesh.storage.base import LockTakenError, StorageError, join
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place

logger = logging.getLogger(__name__)

# Some network file systems cannot sync a folder.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


class SystemCalls:
    """The calls that change or sync files, one method each.

    A test can fail or count every one of them.
    """

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def create(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, file: int, data: memoryview) -> int:
        return os.write(file, data)

    def fsync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def sync_folder(self, path: str) -> None:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def link(self, source: str, target: str) -> None:
        os.link(source, target)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)


def _regular(status: os.stat_result, path: str) -> os.stat_result:
    """Return the status of a file, after refusing a folder, a pipe, a device or a socket."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    return status


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one.

    A link that leads in a circle is neither.
    """
    try:
        return entry.is_dir()
    except OSError:
        return False


class LocalWriter:
    def __init__(self, calls: SystemCalls, path: str) -> None:
        self._calls = calls
        self._path = path
        self._file = calls.create(path)

    def write(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        with this_process().phase(Place.FILE, self._path):
            while view:  # one call may take less than all of it
                count = self._calls.write(self._file, view)
                view = view[count:]

    def finish(self) -> None:
        # A network file system may report a full disk or a lost server only here or when
        # the file is closed: both must have succeeded before a record names the file.
        with this_process().phase(Place.FILE, self._path):
            self._calls.fsync(self._file)
            file = self._file
            self._file = -1
            self._calls.close(file)

    def abort(self) -> None:
        if self._file >= 0:
            file = self._file
            self._file = -1
            try:
                self._calls.close(file)
            except OSError as error:
                logger.warning("closing %s: %s", self._path, error)


class LocalReader:
    """Reads by ``preadv``.

    A file that shrinks gives an error here, where a mapped one would kill the process.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        # Opening a pipe waits for a writer, and opening a device may act on it: neither
        # is ever opened. The second look is for a file that was replaced after the
        # first.
        _regular(os.stat(path), path)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _regular(os.fstat(self._file), path)
        except OSError:
            os.close(self._file)
            raise

    def expect(self, ranges: list[tuple[int, int]]) -> None:
        return

    def read_into(self, start: int, buffer: memoryview) -> None:
        with this_process().phase(Place.FILE, self._path):
            self._read_all(start, buffer)

    def _read_all(self, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file, [buffer[done:]], start + done)
            if count == 0:
                raise EOFError(
                    f"{self._path} ends at byte {start + done}, wanted {start}..{start + len(buffer)}"
                )
            done += count

    def close(self) -> None:
        os.close(self._file)


class LocalLock:
    """A POSIX record lock.

    The kernel drops it when the process ends, however it ends, and a forked child does
    not inherit it.
    """

    def __init__(self, path: str, holder: str) -> None:
        # The file is never deleted: a job that still had the old one open would lock it,
        # and the next one the new one, both with success.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o666)
        try:
            # Not flock: a child of fork (a DataLoader worker, a compiler) shares such a
            # lock and would hold it after this process is gone.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            content = os.pread(self._file, 1000, 0)
            other = content.decode(errors="replace").strip()
            os.close(self._file)
            self._file = -1
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise LockTakenError(path, other or "(it left no name)") from None
            logger.warning(
                "%s: this file system has no locks (%s); a second job would not be noticed",
                path,
                error,
            )
            return
        os.ftruncate(self._file, 0)
        line = f"{holder}\n"
        os.pwrite(self._file, line.encode(), 0)

    def check(self) -> None:
        """Do nothing: the kernel keeps the lock as long as the process lives."""

    def release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class LocalStorage:
    """A ``Storage`` on the local file system."""

    remote = False

    def __init__(self, calls: SystemCalls | None = None) -> None:
        self._calls = calls or SystemCalls()
        self._warned = False

    def make_folder(self, folder: str) -> None:
        folder = folder.rstrip("/") or "/"
        if os.path.isdir(folder):
            return
        parent = os.path.dirname(folder)
        if parent:
            self.make_folder(parent)
        try:
            self._calls.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise StorageError(
                    f"{folder} is a file",
                    expected="a folder, or a name that is still free",
                    fix="choose another folder (ckpt.save_ckpt_folder), or move the file away",
                    code="EVO-SYS-001",
                ) from None
        else:
            self.sync(parent or ".")

    def create(self, path: str) -> LocalWriter:
        return LocalWriter(self._calls, path)

    def publish(self, path: str, data: bytes, token: str) -> None:
        # 1. The whole content, durable, under a name that no reader looks for.
        folder, name = os.path.split(path)
        temporary = join(folder, f".{name}.{token}")
        writer = self.create(temporary)
        try:
            writer.write(data)
            writer.finish()
        finally:
            writer.abort()

        # 2. Its name. A link is a rename that cannot replace: of two jobs only one can
        #    commit. Killed between the two calls, there are two names of one file, and
        #    retention deletes the temporary one.
        try:
            self._calls.link(temporary, path)
            self._calls.unlink(temporary)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "already published", path) from None
            self._calls.rename(temporary, path)

        # 3. The name is durable.
        self.sync(folder or ".")

    def sync(self, folder: str) -> None:
        try:
            self._calls.sync_folder(folder or ".")
        except OSError as error:
            if error.errno not in NO_FOLDER_SYNC:
                raise
            if not self._warned:
                logger.warning(
                    "%s: this file system cannot sync folders (%s); a power loss may lose new names",
                    folder,
                    error,
                )
                self._warned = True

    def open(self, path: str) -> LocalReader:
        return LocalReader(path)

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        reader = self.open(path)
        try:
            if length is None:
                length = self.size(path) - start
            data = bytearray(length)
            reader.read_into(start, memoryview(data))
        finally:
            reader.close()
        return bytes(data)

    def size(self, path: str) -> int:
        return _regular(os.stat(path), path).st_size

    def exists(self, path: str) -> bool:
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def is_link(self, path: str) -> bool:
        return os.path.islink(path)

    def list(self, folder: str) -> list[str]:
        names = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    slash = "/" if _is_folder(entry) else ""
                    names.append(entry.name + slash)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(names)

    def delete(self, path: str) -> None:
        try:
            self._calls.unlink(path)
        except FileNotFoundError:
            return

    def delete_folder(self, folder: str) -> None:
        try:
            self._calls.rmdir(folder)
        except FileNotFoundError:
            return

    def free_bytes(self, folder: str) -> int | None:
        while folder and not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        status = os.statvfs(folder or ".")
        return status.f_bavail * status.f_frsize

    def lock(self, path: str, holder: str) -> LocalLock:
        self.make_folder(os.path.dirname(path) or ".")
        return LocalLock(path, holder)
