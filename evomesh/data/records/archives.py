"""Read the members of .tar, .tar.gz (.tgz) and .zip archives as files, without unpacking the archive to a folder."""

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

ARCHIVE_SUFFIXES = {".tar": "tar", ".tar.gz": "tar.gz", ".tgz": "tar.gz", ".zip": "zip"}
UNSUPPORTED_SUFFIXES = (".7z", ".rar", ".tar.bz2", ".tar.xz", ".tar.zst")
COPY_SIZE = 1 << 20  # bytes read at once
READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    NotImplementedError,  # zipfile raises it for compression methods that it does not know
)


@dataclass(frozen=True)
class ArchiveMember:
    """A file in an archive.

    Attributes:
        name: path inside the archive.
        size: unpacked bytes.
        offset: where its content starts in the unpacked tar; 0 in a zip.
    """

    name: str
    size: int
    offset: int = 0


def archive_kind(path: Path) -> str:
    """Return one of the values of ``ARCHIVE_SUFFIXES``, or "" if ``path`` is not named like an archive."""
    name = path.name.lower()
    return next(
        (kind for suffix, kind in ARCHIVE_SUFFIXES.items() if name.endswith(suffix)), ""
    )


def list_members(path: Path) -> list[ArchiveMember]:
    """List the files in an archive, sorted by name; of several with the same name, the last, as unpacking does.

    Raises:
        UserError: the archive is damaged, truncated or encrypted.
    """
    try:
        members = (
            _zip_members(path) if archive_kind(path) == "zip" else _tar_members(path)
        )
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None
    by_name = {member.name: member for member in members}
    return [by_name[name] for name in sorted(by_name)]


def open_members(path: Path, members: Sequence[ArchiveMember]) -> Iterator[IO[bytes]]:
    """Yield a stream for each member in turn; a stream is valid until the next one is requested.

    Raises:
        UserError: the archive cannot be read.
    """
    try:
        if archive_kind(path) == "zip":
            yield from _open_zip_members(path, members)
        else:
            yield from _open_tar_members(path, members)
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None


def _open_zip_members(
    path: Path, members: Sequence[ArchiveMember]
) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in members:
            with archive.open(member.name) as stream:
                yield stream


def _open_tar_members(
    path: Path, members: Sequence[ArchiveMember]
) -> Iterator[IO[bytes]]:
    in_stored_order = all(
        first.offset < second.offset for first, second in pairwise(members)
    )
    with _open_tar(path, in_stored_order) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            info.offset_data = member.offset
            yield cast(IO[bytes], tar.extractfile(info))


@contextmanager
def _open_tar(path: Path, in_stored_order: bool) -> Iterator[tarfile.TarFile]:
    with ExitStack() as stack:
        stream: IO[bytes] = stack.enter_context(path.open("rb"))
        if archive_kind(path) == "tar.gz":
            stream = stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=stream)))
            if not in_stored_order:
                # Every step back in a gzip stream decompresses it from the start again,
                # so decompress it once.
                unpacked = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stream, unpacked, COPY_SIZE)
                unpacked.seek(0)
                stream = cast(IO[bytes], unpacked)
        yield stack.enter_context(tarfile.open(fileobj=stream, mode="r:"))


def _tar_members(path: Path) -> list[ArchiveMember]:
    with _open_tar(path, in_stored_order=True) as tar:
        members = [
            ArchiveMember(info.name, info.size, info.offset_data)
            for info in tar
            if info.isreg()
        ]
        # tarfile takes a damaged header for the end of the archive and would drop every
        # member after it, so check that it stopped at a real end, which is a block of
        # zeros.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        end_block = tar.fileobj.read(tarfile.BLOCKSIZE)
        if end_block != bytes(tarfile.BLOCKSIZE):
            state = "damaged" if len(end_block) == tarfile.BLOCKSIZE else "truncated"
            raise UserError(
                f"the archive is {state} at byte {tar.offset} (unpacked), after {len(members)} file(s)",
                where=str(path),
                fix="copy or download it again",
            )
        # Read to the end: a compressed tar stores its checksum there.
        while tar.fileobj.read(COPY_SIZE):
            pass
    return members


def _zip_members(path: Path) -> list[ArchiveMember]:
    with zipfile.ZipFile(path) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
    encrypted = [info.filename for info in files if info.flag_bits & 1]
    if encrypted:
        raise UserError(
            f"the member {encrypted[0]} is encrypted",
            where=str(path),
            fix="unpack the archive with its password first",
        )
    return [ArchiveMember(info.filename, info.file_size) for info in files]


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read the archive: {error}",
        where=str(path),
        expected=f"a complete {archive_kind(path)} file",
        fix="copy or download it again",
    )
