"""Find raw input files, and open them as streams of decompressed bytes."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, cast

import zstandard

from evomesh.config.user import expand_home
from evomesh.data.records.archives import (
    UNSUPPORTED_SUFFIXES,
    ArchiveMember,
    archive_kind,
    list_members,
    open_members,
)
from evomesh.data.records.decompress import decompress
from evomesh.errors import UserError

FORMATS = ("txt", "json", "jsonl", "csv", "parquet", "arrow")
TABLE_FORMATS = ("parquet", "arrow")  # their readers seek
COMPRESSIONS = ("gz", "zst")
# of Hugging Face folders
METADATA_FILES = (
    "dataset_info.json",
    "dataset_dict.json",
    "dataset_infos.json",
    "state.json",
)
FINGERPRINT_SUFFIX = ".bin.json"  # beside token files
APPLE_DOUBLE_PREFIX = "._"  # macOS stores the attributes of x as "._x" in archives
COPY_SIZE = 1 << 20
READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, zstandard.ZstdError)


@dataclass(frozen=True)
class SourceFile:
    """An input file, which may be the member of an archive.

    Attributes:
        path: the file, or the archive that contains it.
        format: one of ``FORMATS``.
        compression: one of ``COMPRESSIONS``, or "".
        member: the member of the archive ``path``; None: ``path`` itself is the file.
    """

    path: Path
    format: str
    compression: str
    member: ArchiveMember | None = None

    @property
    def full_path(self) -> Path:
        """Return the file's path, in which an archive counts as a folder."""
        return self.path / self.member.name if self.member else self.path

    @property
    def size(self) -> int:
        """Return the file's bytes; of an archive's member, those after unpacking the archive."""
        return self.member.size if self.member else self.path.stat().st_size


def find_source_files(inputs: list[str]) -> list[SourceFile]:
    """Find the files that paths, globs and folders name; archives are treated as folders.

    Folders are walked in sorted order. A file appears once per mention.

    Raises:
        UserError: an input matches nothing, a file's format is unknown, or an archive is damaged.
    """
    found: list[SourceFile] = []
    for item in inputs:
        path = expand_home(item)
        if path.is_dir():
            inside = list_source_files(path)
            if not inside:
                raise UserError(
                    f"no {', '.join(FORMATS)} file below {path}", where="input"
                )
            found += inside
        else:
            found += _match_files(item, path)
    return found


def _match_files(item: str, pattern: Path) -> list[SourceFile]:
    """Return the input files at a path or glob."""
    paths = [pattern]
    if not pattern.exists():
        paths = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    if not paths:
        raise UserError(
            f"no such file: {item}",
            where="input",
            expected="a file, a folder or a glob that matches files",
        )
    found: list[SourceFile] = []
    for path in paths:
        files = _source_files_at(path)
        if not files:
            problem = (
                "contains no such file"
                if archive_kind(path)
                else "has an unknown format"
            )
            raise UserError(
                f"{path.name!r} {problem}",
                where=str(path),
                expected=f"a name that ends in .{', .'.join(FORMATS)}, a text format followed by .gz or .zst, "
                "or a .tar, .tar.gz, .tgz or .zip of such files",
            )
        found += files
    return found


def list_source_files(folder: Path) -> list[SourceFile]:
    """List all input files below a folder, in sorted order; files of unknown formats are ignored.

    Raises:
        UserError: an archive is damaged, or of a kind that is not supported.
    """
    found: list[SourceFile] = []
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            found += _source_files_at(Path(directory) / name)
    return found


def _source_files_at(path: Path) -> list[SourceFile]:
    """Return the file itself, or the files in an archive; nothing if the format is unknown."""
    if path.name.lower().endswith(UNSUPPORTED_SUFFIXES):
        raise UserError(
            "archives of this kind are not supported",
            where=str(path),
            fix="unpack it, or repack it as a .tar.gz",
        )
    candidates: Sequence[ArchiveMember | None] = (
        list_members(path) if archive_kind(path) else [None]
    )
    files = [_classify(path, member) for member in candidates]
    return [file for file in files if file is not None]


def _classify(path: Path, member: ArchiveMember | None) -> SourceFile | None:
    """Return the input file, or None if its name has no known format."""
    name = Path(member.name).name if member else path.name
    if name in METADATA_FILES or name.endswith(FINGERPRINT_SUFFIX):
        return None
    if member and name.startswith(APPLE_DOUBLE_PREFIX):
        return None
    # "texts.jsonl.gz" is of the format "jsonl", compressed with "gz".
    parts = name.lower().split(".")
    compression = ""
    if parts[-1] in COMPRESSIONS:
        compression = parts.pop()
    if len(parts) < 2:
        return None
    file_format = parts[-1]
    if file_format not in FORMATS:
        return None
    return SourceFile(path, file_format, compression, member)


def open_files(
    files: Sequence[SourceFile],
) -> Iterator[tuple[SourceFile, IO[bytes], IO[bytes]]]:
    """Yield each file with its decompressed stream and the raw stream, whose position in ``size`` shows progress.

    Consecutive members of one archive are read in one pass through it.

    Raises:
        UserError: a file cannot be read.
    """

    def path_and_kind(file: SourceFile) -> tuple[Path, bool]:
        return file.path, file.member is None

    for (path, is_plain), group in groupby(files, key=path_and_kind):
        if is_plain:
            for file in group:
                with _open(path) as raw:
                    yield file, decompress(raw, file.compression), raw
        else:
            yield from _open_archived(path, list(group))


def _open_archived(
    archive: Path, files: Sequence[SourceFile]
) -> Iterator[tuple[SourceFile, IO[bytes], IO[bytes]]]:
    members = [file.member for file in files if file.member]
    for file, raw in zip(files, open_members(archive, members), strict=True):
        # Tables are read with seeks, which are slow in compressed bytes; only plain tar
        # stores members as they are.
        if file.format in TABLE_FORMATS and archive_kind(archive) != "tar":
            with tempfile.TemporaryFile() as copy:
                _copy(raw, copy, file)
                yield file, cast(IO[bytes], copy), raw
        else:
            yield file, decompress(raw, file.compression), raw


def _open(path: Path) -> IO[bytes]:
    try:
        # A pipe would block forever, and the input is read twice.
        if not path.is_file():
            raise UserError(
                "not a regular file",
                where=str(path),
                expected="a regular file (it may be compressed)",
            )
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read the file: {error.strerror}", where=str(path)
        ) from None


def _copy(source: IO[bytes], target: IO[bytes], file: SourceFile) -> None:
    try:
        shutil.copyfileobj(source, target, COPY_SIZE)
    except READ_ERRORS as error:
        raise UserError(
            f"cannot read the file: {error}", where=str(file.full_path)
        ) from None
    target.seek(0)
