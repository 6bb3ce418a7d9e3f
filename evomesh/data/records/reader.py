"""Raw records one at a time, in flat memory: txt, jsonl, json (a list) and csv, plain, .gz or .zst; parquet and arrow;
and archives of such files."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any, cast

import ijson
import orjson
import zstandard

from evomesh.data.records.archives import UNREAD, ArchiveMember, archive_kind, list_members, open_members
from evomesh.data.records.decompress import unpacked
from evomesh.data.token_files.lines import json_kind
from evomesh.errors import UserError

FORMATS = ("txt", "json", "jsonl", "csv", "parquet", "arrow")
TABLES = ("parquet", "arrow")  # read from several places of the file
PACKERS = ("gz", "zst")
DESCRIPTIONS = (
    "dataset_info.json",
    "dataset_dict.json",
    "dataset_infos.json",
    "state.json",
)  # of Hugging Face folders
FINGERPRINT = ".bin.json"  # beside token files
MARK = b"\xef\xbb\xbf"  # of UTF-8, which some systems put in front of a text
TABLE_ROWS = 1024  # rows decoded at once
CSV_FIELD = 2**30  # bytes that one field may have
BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile, zstandard.ZstdError)


@dataclass(frozen=True)
class SourceFile:
    """An input file. ``format`` is one of FORMATS, ``packer`` one of PACKERS or "".

    ``member``: the part of the archive ``path`` that it is; None: ``path`` itself.
    """

    path: Path
    format: str
    packer: str
    member: ArchiveMember | None = None

    @property
    def place(self) -> Path:
        """Where it lies, an archive taken as a folder."""
        return self.path / self.member.name if self.member else self.path

    @property
    def size(self) -> int:
        """Bytes; of an archive's member those after unpacking."""
        return self.member.size if self.member else self.path.stat().st_size


def open_files(files: Sequence[SourceFile]) -> Iterator[tuple[SourceFile, IO[bytes], IO[bytes]]]:
    """Each file in turn with its unpacked bytes, and the stream below them, whose position in ``size`` shows progress.

    Members of one archive that follow one another are read in one pass through it.

    Raises:
        UserError: a file cannot be read.
    """
    for (path, plain), group in groupby(files, key=lambda file: (file.path, file.member is None)):
        inside = list(group)
        if plain:
            for file in inside:
                with _open(path) as raw:
                    yield file, unpacked(raw, file.packer), raw
            continue
        members = [file.member for file in inside if file.member]
        for file, raw in zip(inside, open_members(path, members), strict=True):
            if file.format in TABLES and archive_kind(path) != "tar":  # going back in packed bytes is slow
                with tempfile.TemporaryFile() as whole:
                    _copy(raw, whole, file)
                    yield file, cast(IO[bytes], whole), raw
            else:
                yield file, unpacked(raw, file.packer), raw


def _open(path: Path) -> IO[bytes]:
    try:
        if not path.is_file():  # reading a pipe would wait for ever, and it is read twice
            raise UserError("not a regular file", where=str(path), expected="a file, which may be packed")
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=str(path)) from None


def _copy(source: IO[bytes], target: IO[bytes], file: SourceFile) -> None:
    try:
        shutil.copyfileobj(source, target, 1 << 20)
    except BROKEN as error:
        raise UserError(f"cannot read the file: {error}", where=str(file.place)) from None
    target.seek(0)


@dataclass(frozen=True)
class SourceRecord:
    """What a file holds at one place: text of a txt line, else a parsed JSON value. ``raw`` is a jsonl line as read."""

    value: Any
    where: str
    raw: bytes = b""


def find_texts(inputs: list[str]) -> list[SourceFile]:
    """Files of paths, globs and folders (walked in sorted order), each once per mention; archives are taken as folders.

    Raises:
        UserError: an input names nothing, a file is of no known kind, or an archive is broken.
    """
    found: list[SourceFile] = []
    for item in inputs:
        path = Path(item).expanduser()
        if path.is_dir():
            inside = list_texts(path)
            if not inside:
                raise UserError(f"no {', '.join(FORMATS)} file below {path}", where="input")
            found += inside
            continue
        names = (
            [path] if path.exists() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        )
        if not names:
            raise UserError(
                f"no such file: {item}", where="input", expected="a file, a folder or a glob that matches"
            )
        for name in names:
            files = _files_of(name)
            if not files:
                what = "holds no such file" if archive_kind(name) else "is of no known kind"
                raise UserError(
                    f"{name.name!r} {what}",
                    where=str(name),
                    expected=f"a name ending in .{', .'.join(FORMATS)}, or text with .gz or .zst behind, "
                    "or a .tar, .tar.gz, .tgz or .zip of such files",
                )
            found += files
    return found


def list_texts(folder: Path) -> list[SourceFile]:
    """All files below a folder, in sorted order; other kinds are left out.

    Raises:
        UserError: an archive is broken, or of a kind that cannot be read.
    """
    found: list[SourceFile] = []
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            found += _files_of(Path(directory) / name)
    return found


def _files_of(path: Path) -> list[SourceFile]:
    """A file, the files in an archive, or nothing when it is of no known kind."""
    if path.name.lower().endswith(UNREAD):
        raise UserError(
            "archives of this kind are not read", where=str(path), fix="unpack it, or make it a .tar.gz"
        )
    if not archive_kind(path):
        return _classify(path)
    return [file for member in list_members(path) for file in _classify(path, member)]


def _classify(path: Path, member: ArchiveMember | None = None) -> list[SourceFile]:
    name = Path(member.name).name if member else path.name
    parts = name.lower().split(".")
    packer = parts.pop() if parts[-1] in PACKERS else ""
    # "._x" in archives holds what macOS knows about x
    described = (
        name in DESCRIPTIONS or name.endswith(FINGERPRINT) or (member is not None and name[:2] == "._")
    )
    known = parts[-1] in FORMATS and len(parts) > 1 and not described
    return [SourceFile(path, parts[-1], packer, member)] if known else []


def read_records(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """Records of an opened file: a txt line without the white space around it (blank ones are left out), a json list's
    element, a jsonl line (blank ones are left out).

    Raises:
        UserError: the content is not what the name says; names file and line.
    """
    try:
        if file.format in _READERS:
            yield from _READERS[file.format](stream, file)
            return
        for number, line in enumerate(chain([stream.readline().removeprefix(MARK)], stream), 1):
            where = f"{file.place} line {number}"
            if not line.strip():
                continue
            if file.format == "txt":
                yield SourceRecord(_decode(line, where).strip(), where, line)
            else:
                yield SourceRecord(_parse(line, where), where, line)
    except BROKEN as error:
        raise UserError(f"cannot read the file: {error}", where=str(file.place)) from None


def read_lines(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """The documents' literal reading: a txt line stripped, a json element as JSON text, a jsonl line as it stands,
    with its newline, blank or not.

    Raises:
        UserError: as ``read_records``.
    """
    if file.format == "txt":
        yield from read_records(stream, file)
    elif file.format == "json":
        for record in read_records(stream, file):
            yield SourceRecord(json.dumps(record.value), record.where)
    else:
        try:
            for number, line in enumerate(stream, 1):
                where = f"{file.place} line {number}"
                yield SourceRecord(_decode(line, where), where, line)
        except BROKEN as error:
            raise UserError(f"cannot read the file: {error}", where=str(file.place)) from None


def _read_json(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    try:
        start = stream.read(1)
        if start == MARK[:1] and stream.read(2) == MARK[1:]:
            start = stream.read(1)
        while start.isspace():
            start = stream.read(1)
        if start != b"[":
            raise UserError(
                f"the file starts with {start.decode('utf-8', 'replace')!r}",
                where=str(file.place),
                expected="a list of records; name the file .jsonl when it has one record a line",
            )
        rest = _PrefixedStream(b"[", stream)
        for number, value in enumerate(ijson.items(rest, "item", use_float=True), 1):
            yield SourceRecord(value, f"{file.place} record {number}")
    except ijson.JSONError as error:
        raise UserError(f"not JSON ({error})", where=str(file.place), expected="a list of records") from None


def _read_csv(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """Rows of a csv file by the names in its first line."""
    csv.field_size_limit(CSV_FIELD)
    rows = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    try:
        names = next(rows, [])
        for row in rows:
            where = f"{file.place} line {rows.line_num}"
            if len(row) == len(names):
                yield SourceRecord(dict(zip(names, row, strict=True)), where)
            elif row:  # an empty line is none
                raise UserError(
                    f"the row has {len(row)} fields", where=where, expected=f"{len(names)}, as line 1 has"
                )
    except csv.Error as error:
        raise UserError(f"not csv ({error})", where=f"{file.place} line {rows.line_num}") from None
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        raise UserError(found, where=f"{file.place} after line {rows.line_num}") from None


def _read_table(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """Rows of a Hugging Face dataset's files."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "reading it needs pyarrow", where=str(file.place), fix="pip install 'evomesh[streaming]'"
        ) from None
    try:
        if file.format == "parquet":
            batches = pyarrow.parquet.ParquetFile(stream).iter_batches(TABLE_ROWS)
        else:
            batches = _arrow_batches(stream, pyarrow)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield SourceRecord(row, f"{file.place} row {number}")
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"not a {file.format} file ({error})", where=str(file.place)) from None


def _arrow_batches(stream: IO[bytes], pyarrow: Any) -> Iterator[Any]:
    try:  # what datasets.save_to_disk writes
        yield from pyarrow.ipc.open_stream(stream)
    except pyarrow.ArrowInvalid:
        stream.seek(0)
        reader = pyarrow.ipc.open_file(stream)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


_READERS = {"json": _read_json, "csv": _read_csv, "parquet": _read_table, "arrow": _read_table}


class _PrefixedStream:
    """A stream with bytes put back in front."""

    def __init__(self, prefix: bytes, stream: IO[bytes]) -> None:
        self._prefix, self._stream = prefix, stream

    def read(self, size: int = -1) -> bytes:
        if size == 0:
            return b""
        prefix, self._prefix = self._prefix, b""
        return prefix or self._stream.read(size)


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte 0x{line[error.start]:02x} is not UTF-8", where=f"{where} byte {error.start}"
        ) from None


def _parse(line: bytes, where: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(
            f"the line is not JSON ({error})", where=where, expected="one JSON object a line"
        ) from None


def field_text(record: SourceRecord, field: str) -> str:
    """The text of a record: a txt line itself, else its field.

    Raises:
        UserError: no such field, or it is no string.
    """
    if isinstance(record.value, str):
        return record.value
    if not isinstance(record.value, dict) or field not in record.value:
        keys = ", ".join(record.value) if isinstance(record.value, dict) else json_kind(record.value)
        raise UserError(
            f"the record has no field {field!r} (it has: {keys or 'none'})",
            where=record.where,
            fix="name the field: --text-field NAME, or encode the whole line: --raw-lines",
        )
    text = record.value[field]
    if not isinstance(text, str):
        raise UserError(
            f"the field {field!r} is of type {json_kind(text)}", where=record.where, expected="a string"
        )
    return text
