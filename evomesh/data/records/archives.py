"""Members of .tar, .tar.gz (.tgz) and .zip archives as files, read without unpacking them to a folder."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, cast

from evomesh.errors import UserError

KINDS = {".tar": "tar", ".tar.gz": "tar.gz", ".tgz": "tar.gz", ".zip": "zip"}
UNREAD = (".7z", ".rar", ".tar.bz2", ".tar.xz", ".tar.zst")  # users must unpack these
BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, NotImplementedError)
BLOCK = 1 << 20


@dataclass(frozen=True)
class ArchiveMember:
    """A file in an archive. ``size``: unpacked bytes; ``offset``: of its content in the unpacked tar, 0 in a zip."""

    name: str
    size: int
    offset: int = 0


def archive_kind(path: Path) -> str:
    """One of the values of ``KINDS``, "" for anything else."""
    name = path.name.lower()
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), "")


def list_members(path: Path) -> list[ArchiveMember]:
    """The files in an archive, sorted by name; of several with one name the last, as unpacking would leave.

    Raises:
        UserError: it is broken, torn or encrypted.
    """
    try:
        members = _zip_members(path) if archive_kind(path) == "zip" else _tar_members(path)
    except BROKEN as error:
        raise _unreadable(path, error) from None
    found = {member.name: member for member in members}
    return [found[name] for name in sorted(found)]


def open_members(path: Path, members: Sequence[ArchiveMember]) -> Iterator[IO[bytes]]:
    """A stream for each member in turn, good until the next is asked for.

    Raises:
        UserError: the archive cannot be read.
    """
    try:
        if archive_kind(path) == "zip":
            with zipfile.ZipFile(path) as archive:
                for member in members:
                    with archive.open(member.name) as stream:
                        yield stream
        else:
            with _open_tar(path, all(a.offset < b.offset for a, b in pairwise(members))) as tar:
                for member in members:
                    info = tarfile.TarInfo(member.name)
                    info.size, info.offset_data = member.size, member.offset
                    yield cast(IO[bytes], tar.extractfile(info))
    except BROKEN as error:
        raise _unreadable(path, error) from None


@contextmanager
def _open_tar(path: Path, in_order: bool) -> Iterator[tarfile.TarFile]:
    with ExitStack() as stack:
        raw: IO[bytes] = stack.enter_context(path.open("rb"))
        if archive_kind(path) == "tar.gz":
            raw = stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=raw)))
            if not in_order:  # each step back would unpack all from the start again
                unpacked = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(raw, unpacked, BLOCK)
                unpacked.seek(0)
                raw = cast(IO[bytes], unpacked)
        yield stack.enter_context(tarfile.open(fileobj=raw, mode="r:"))


def _tar_members(path: Path) -> list[ArchiveMember]:
    with _open_tar(path, in_order=True) as tar:
        found = [ArchiveMember(info.name, info.size, info.offset_data) for info in tar if info.isreg()]
        # tarfile takes a damaged header for the end, and would lose what stands behind it
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(tarfile.BLOCKSIZE)
        if end != bytes(tarfile.BLOCKSIZE):
            state = "damaged" if len(end) == tarfile.BLOCKSIZE else "torn"
            raise UserError(
                f"the archive is {state} at byte {tar.offset} (unpacked), after {len(found)} file(s)",
                where=str(path),
                fix="copy or download it again",
            )
        while tar.fileobj.read(BLOCK):  # a compressed tar has its checksum at the end
            pass
    return found


def _zip_members(path: Path) -> list[ArchiveMember]:
    with zipfile.ZipFile(path) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
    locked = [info.filename for info in files if info.flag_bits & 1]
    if locked:
        raise UserError(
            f"{locked[0]} in it is encrypted", where=str(path), fix="unpack it with its password first"
        )
    return [ArchiveMember(info.filename, info.file_size) for info in files]


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read the archive: {error}",
        where=str(path),
        expected=f"a complete {archive_kind(path)} file",
        fix="copy or download it again",
    )
