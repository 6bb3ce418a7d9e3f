"""Find raw input files, and open them as streams of decompressed bytes."""

from __future__ import annotations

import glob
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, TypeAlias

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
from evomesh.data.records.encodings import UTF8, check_encoding, recode
from evomesh.data.records.limits import UnpackLimitError, unpack_limit, unpacks_too_far
from evomesh.data.records.spill import spilled
from evomesh.errors import UserError
from evomesh.outside_errors import fix_for

FORMATS = ("txt", "json", "jsonl", "csv", "parquet", "arrow")
WHOLE_FILE = "file"  # the format of a file of any name that is one document
TABLE_FORMATS = ("parquet", "arrow")  # their readers seek
COMPRESSIONS = ("gz", "zst")
SHOWN_ENDINGS = 5  # in the message about a folder without any input file
# Of Hugging Face folders: about the dataset, or a tokenizer and model beside it.
METADATA_FILES = (
    "dataset_info.json",
    "dataset_dict.json",
    "dataset_infos.json",
    "state.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
HIDDEN = (".", "__")  # first letters of folders
FINGERPRINT_SUFFIX = ".bin.json"  # beside token files
APPLE_DOUBLE_PREFIX = "._"  # macOS stores the attributes of x as "._x" in archives
READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, zstandard.ZstdError)


# A file, its decompressed stream, and the raw one.
OpenedFile: TypeAlias = tuple["SourceFile", IO[bytes], IO[bytes]]


@dataclass(frozen=True)
class SourceFile:
    """An input file, which may be the member of an archive.

    Attributes:
        path: the file, or the archive that contains it.
        format: one of ``FORMATS``, or ``WHOLE_FILE``.
        compression: one of ``COMPRESSIONS``, or "".
        member: the member of the archive ``path``; None: ``path`` itself is the file.
        encoding: of a text file.
    """

    path: Path
    format: str
    compression: str
    member: ArchiveMember | None = None
    encoding: str = UTF8

    @property
    def full_path(self) -> Path:
        """Return the file's path, in which an archive counts as a folder."""
        return self.path / self.member.name if self.member else self.path

    @property
    def size(self) -> int:
        """Return the file's bytes; of an archive's member, those after unpacking the archive."""
        return self.member.size if self.member else self.path.stat().st_size

    @property
    def packed_size(self) -> int:
        """Return the bytes that the file takes on the disk, which limit what it may unpack to."""
        return self.member.packed if self.member else self.path.stat().st_size

    def unpacks_too_far(self, where: str = "") -> UserError:
        """Return the error for a file that unpacks to more than its limit."""
        return unpacks_too_far(where or str(self.full_path), self.packed_size)


def find_source_files(
    inputs: list[str], encoding: str = UTF8, *, whole: bool = False
) -> list[SourceFile]:
    """Find the files that paths, globs and folders name; archives are treated as folders.

    Folders are walked in sorted order.

    Args:
        encoding: of the text files.
        whole: each file is one document, whatever its name ends in.

    Raises:
        UserError: an input matches nothing, a file's format or the encoding is unknown, an archive is damaged, or two
            inputs name the same file, whose documents would be there twice.
    """
    encoding = check_encoding(encoding, "--encoding")
    found: list[SourceFile] = []
    named_by: dict[str, int] = {}  # real path of a file -> number of the input
    for number, item in enumerate(inputs):
        files = _find_input(item, whole)
        for real_path in {os.path.realpath(file.path) for file in files}:
            first = named_by.setdefault(real_path, number)
            if first != number:
                raise UserError(
                    f"the file is named twice, by {inputs[first]} and by {item}",
                    where=real_path,
                    expected="every file once",
                    fix=f"remove {item}, or narrow one of the two",
                    code="EVO-DATA-024",
                )
        found += files
    return [replace(file, encoding=encoding) for file in found]


def _find_input(item: str, whole: bool) -> list[SourceFile]:
    """Return the files that one path, glob or folder names."""
    path = expand_home(item)
    if not path.is_dir():
        return _match_files(item, path, whole)
    inside = list_source_files(path, whole=whole)
    if not inside and whole:
        raise UserError(f"no file below {path}", where="input", code="EVO-DATA-002")
    if not inside:
        raise UserError(
            f"no {', '.join(FORMATS)} file below {path}{_other_endings(path)}",
            where="input",
            fix="name the folder that holds them, or a file; with --whole-files each text file is a document, "
            "whatever its ending",
            code="EVO-DATA-002",
        )
    return inside


def _other_endings(folder: Path) -> str:
    """Say, for a message, which endings the files of a folder have; "" if it has none."""
    counts: Counter[str] = Counter()
    for _, folders, names in os.walk(folder):
        folders[:] = _visible(folders, HIDDEN)
        visible = _visible(names, (".",))
        counts.update(Path(name).suffix for name in visible)
    shown = []
    for ending, count in counts.most_common(SHOWN_ENDINGS):
        name = ending or "no ending"
        shown.append(f"{name} ({count:,})")
    if not shown:
        return ""
    more = ", ..." if len(counts) > SHOWN_ENDINGS else ""
    return f"; files of other endings are not read: {', '.join(shown)}{more}"


def _match_files(item: str, pattern: Path, whole: bool) -> list[SourceFile]:
    """Return the input files at a path or glob."""
    paths = [pattern]
    if not pattern.exists():
        paths = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    if not paths:
        raise UserError(
            f"no such file: {item}",
            where="input",
            expected="a file, a folder or a glob that matches files",
            code="EVO-DATA-001",
        )
    found: list[SourceFile] = []
    for path in paths:
        files = _source_files_at(path, whole)
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
                code="EVO-DATA-008",
            )
        found += files
    return found


def list_source_files(folder: Path, *, whole: bool = False) -> list[SourceFile]:
    """List all input files below a folder, in sorted order; hidden ones and unknown formats are ignored.

    Args:
        whole: each file is one document, whatever its name ends in.

    Raises:
        UserError: an archive is damaged, or of a kind that is not supported.
    """
    found: list[SourceFile] = []
    for path in _visible_paths(folder):
        files = _source_files_at(path, whole)
        found += files
    return found


def _visible_paths(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, in sorted order."""
    for directory, folders, names in os.walk(folder, followlinks=True):
        # As datasets does: .git, .cache and what editors leave are not data. ``os.walk``
        # enters what is left in its list, in that order.
        folders[:] = _visible(folders, HIDDEN)
        for name in _visible(names, (".",)):
            yield Path(directory, name)


def _visible(names: Iterable[str], hidden: tuple[str, ...]) -> list[str]:
    """Return, sorted, the names that do not begin like hidden ones."""
    return sorted(name for name in names if not name.startswith(hidden))


def _source_files_at(path: Path, whole: bool) -> list[SourceFile]:
    """Return the file itself, or the files in an archive; nothing if the format is unknown."""
    if path.name.lower().endswith(UNSUPPORTED_SUFFIXES):
        raise UserError(
            "archives of this kind are not supported",
            where=str(path),
            fix="unpack it, or repack it as a .tar.gz",
            code="EVO-DATA-012",
        )
    candidates: Sequence[ArchiveMember | None] = (
        list_members(path) if archive_kind(path) else [None]
    )
    files = [_classify(path, member, whole) for member in candidates]
    return [file for file in files if file is not None]


def _classify(
    path: Path, member: ArchiveMember | None, whole: bool
) -> SourceFile | None:
    """Return the input file, or None if its name has no known format."""
    name = path.name
    if member:
        name = Path(member.name).name
        if name.startswith(APPLE_DOUBLE_PREFIX):
            return None
    is_metadata = name in METADATA_FILES or name.endswith(FINGERPRINT_SUFFIX)
    if is_metadata and not whole:
        return None
    # "texts.jsonl.gz" is of the format "jsonl", compressed with "gz".
    parts = name.lower().split(".")
    compression = ""
    if parts[-1] in COMPRESSIONS:
        compression = parts.pop()
    if whole:
        return SourceFile(path, WHOLE_FILE, compression, member)
    # A name without a dot, such as "json", has no format.
    *stem, file_format = parts
    if not stem or file_format not in FORMATS:
        return None
    return SourceFile(path, file_format, compression, member)


def _path_and_kind(file: SourceFile) -> tuple[Path, bool]:
    """Return the path and whether it is read as a plain file, which an archive may be too."""
    return file.path, file.member is None


def open_files(files: Sequence[SourceFile]) -> Iterator[OpenedFile]:
    """Yield each file with its decompressed stream and the raw stream, whose position in ``size`` shows progress.

    Consecutive members of one archive are read in one pass through it.

    Raises:
        UserError: a file cannot be read.
    """
    for (path, is_plain), group in groupby(files, key=_path_and_kind):
        if not is_plain:
            members = list(group)
            yield from _open_archived(path, members)
            continue
        for file in group:
            with _open(path) as raw, _readable(file, raw) as stream:
                yield file, stream, raw


def _open_archived(archive: Path, files: Sequence[SourceFile]) -> Iterator[OpenedFile]:
    members = [file.member for file in files if file.member]
    for file, raw in zip(files, open_members(archive, members), strict=True):
        with _readable(file, raw) as stream:
            yield file, stream, raw


@contextmanager
def _readable(file: SourceFile, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the stream that the reader of the file's format needs: decompressed, in UTF-8, for tables seekable."""
    stream = decompress(raw, file.compression, file.packed_size)
    if file.format not in TABLE_FORMATS:
        yield recode(stream, file.encoding, str(file.full_path))
        return
    # Tables are read with seeks, which are slow in compressed bytes or impossible; plain
    # tar alone stores members as they are.
    is_packed = file.member is not None and archive_kind(file.path) != "tar"
    if not is_packed and not file.compression:
        yield raw
        return
    with ExitStack() as stack:
        try:
            size = max(file.size, unpack_limit(file.packed_size))
            where = str(file.full_path)
            copy = stack.enter_context(spilled(stream, size, where))
        except UnpackLimitError:
            raise file.unpacks_too_far() from None
        except READ_ERRORS as error:
            raise UserError(
                f"cannot read the file: {error}",
                where=where,
                fix="copy or download it again",
                code="EVO-DATA-009",
            ) from None
        yield copy


def _open(path: Path) -> IO[bytes]:
    try:
        # A pipe would block forever, and the input is read twice.
        if not path.is_file():
            raise UserError(
                "not a regular file",
                where=str(path),
                expected="a regular file (it may be compressed)",
                fix="write what it yields to a file first",
                code="EVO-DATA-001",
            )
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read the file: {error.strerror}",
            where=str(path),
            fix=fix_for(error.errno),
            code="EVO-DATA-001",
        ) from None
