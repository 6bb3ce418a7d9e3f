"""Read the members of .tar, .tar.gz (.tgz) and .zip archives as files, without unpacking the archive to a folder."""

from __future__ import annotations

import gzip
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, cast

from evomesh.data.records.limits import unpack_limit, unpacks_too_far
from evomesh.data.records.spill import spilled
from evomesh.errors import UserError
from evomesh.quantities import counted

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
        packed: its share of the archive's bytes.
        offset: where its content starts in the unpacked tar; 0 in a zip.
    """

    name: str
    size: int
    packed: int
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
        UserError: the archive is damaged, truncated or encrypted, or unpacks too far.
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
    with ExitStack() as stack:
        stored = _open_tar_stream(path)
        stream = stack.enter_context(stored)
        is_compressed = archive_kind(path) == "tar.gz"
        if is_compressed and not _are_in_stored_order(members):
            # Every step back in a gzip stream decompresses it from the start again, so
            # decompress it once, up to the end of the last member.
            ends = [member.offset + member.size for member in members]
            last_end = max(ends)
            copy = spilled(stream, last_end, str(path))
            stream = stack.enter_context(copy)
        tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r:"))
        for member in members:
            yield _open_tar_member(tar, member)


def _open_tar_member(tar: tarfile.TarFile, member: ArchiveMember) -> IO[bytes]:
    """Open a member whose place is known from listing the archive, so that no header is read again."""
    info = tarfile.TarInfo(member.name)
    info.size = member.size
    info.offset_data = member.offset
    opened = tar.extractfile(info)
    return cast(IO[bytes], opened)


def _are_in_stored_order(members: Sequence[ArchiveMember]) -> bool:
    pairs = pairwise(member.offset for member in members)
    return all(first < second for first, second in pairs)


@contextmanager
def _open_tar_stream(path: Path) -> Iterator[IO[bytes]]:
    """Open the bytes of a tar, decompressed."""
    with path.open("rb") as file:
        if archive_kind(path) == "tar.gz":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast(IO[bytes], unpacked)
        else:
            yield file


def _tar_members(path: Path) -> list[ArchiveMember]:
    """List the regular files of a tar, and read it to its end."""
    archive_bytes = path.stat().st_size
    limit = unpack_limit(archive_bytes)
    with (
        _open_tar_stream(path) as stream,
        tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
        found: list[tarfile.TarInfo] = []
        for info in tar:
            # A member's header is enough: its content would be decompressed only to find
            # the next header.
            if info.offset_data + info.size > limit:
                raise unpacks_too_far(f"{path}/{info.name}", archive_bytes)
            if info.issparse():
                raise UserError(
                    f"the member {info.name} is stored as a sparse file",
                    where=str(path),
                    fix="repack it without --sparse",
                    code="EVO-DATA-012",
                )
            if info.isreg():
                found.append(info)
        unpacked_bytes = _read_to_end(tar, path, len(found))
    share = archive_bytes / max(1, unpacked_bytes)
    return [
        ArchiveMember(
            info.name, info.size, math.ceil(info.size * share), info.offset_data
        )
        for info in found
    ]


def _read_to_end(tar: tarfile.TarFile, path: Path, count: int) -> int:
    """Check that a tar whose ``count`` files were listed is complete; return its unpacked bytes."""
    # tarfile takes a damaged header for the end of the archive and would drop every
    # member after it, so check that it stopped at a real end, which is a block of zeros.
    stream = tar.fileobj
    assert stream is not None
    stream.seek(tar.offset)
    end_block = stream.read(tarfile.BLOCKSIZE)
    if end_block != bytes(tarfile.BLOCKSIZE):
        state = "damaged" if len(end_block) == tarfile.BLOCKSIZE else "truncated"
        raise UserError(
            f"the archive is {state} at byte {tar.offset} (unpacked), after {counted(count, 'file')}",
            where=str(path),
            fix="copy or download it again",
            code="EVO-DATA-012",
        )
    # A compressed tar stores its checksum at its end.
    unpacked_bytes = tar.offset + len(end_block)
    archive_bytes = path.stat().st_size
    while block := stream.read(COPY_SIZE):
        unpacked_bytes += len(block)
        if unpacked_bytes > unpack_limit(archive_bytes):
            raise unpacks_too_far(str(path), archive_bytes)
    return unpacked_bytes


def _zip_members(path: Path) -> list[ArchiveMember]:
    with zipfile.ZipFile(path) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
    members = []
    unpacked_bytes = 0
    for info in files:
        if info.flag_bits & 1:
            raise UserError(
                f"the member {info.filename} is encrypted",
                where=str(path),
                fix="unpack the archive with its password first",
                code="EVO-DATA-012",
            )
        # The size is that of the directory: zipfile reads no member past it.
        packed = info.compress_size
        if info.file_size > unpack_limit(packed):
            raise unpacks_too_far(f"{path}/{info.filename}", packed)
        unpacked_bytes += info.file_size
        member = ArchiveMember(info.filename, info.file_size, packed)
        members.append(member)
    # Members may share their bytes, each of them within its limit: the sum tells.
    archive_bytes = path.stat().st_size
    if unpacked_bytes > unpack_limit(archive_bytes):
        raise unpacks_too_far(str(path), archive_bytes)
    return members


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read the archive: {error}",
        where=str(path),
        expected=f"a complete {archive_kind(path)} file",
        fix="copy or download it again",
        code="EVO-DATA-012",
    )
