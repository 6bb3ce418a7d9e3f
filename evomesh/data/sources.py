"""Raw records one at a time, in flat memory: txt, jsonl and json (a list), plain, .gz or .zst; parquet and arrow."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import ijson
import orjson
import zstandard

from evomesh.errors import UserError

FORMATS = ("txt", "json", "jsonl", "parquet", "arrow")
PACKERS = ("gz", "zst")
DESCRIPTIONS = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")  # of Hugging Face folders
TABLE_ROWS = 1024  # rows decoded at once


@dataclass(frozen=True)
class TextFile:
    """An input file. ``format`` is one of FORMATS, ``packer`` one of PACKERS or ""."""

    path: Path
    format: str
    packer: str

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """The unpacked bytes, and the file below them, whose position shows the progress."""
        with self.path.open("rb") as raw:
            if self.packer == "gz":
                yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)), raw
            elif self.packer == "zst":
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                yield io.BufferedReader(reader, 1 << 20), raw
            else:
                yield raw, raw


@dataclass(frozen=True)
class Record:
    """What a file holds at one place: text of a txt line, else a parsed JSON value. ``raw`` is a jsonl line as read."""

    value: Any
    where: str
    raw: bytes = b""


def find_texts(inputs: list[str]) -> list[TextFile]:
    """Files of paths, globs and folders (walked in sorted order), each once per mention.

    Raises:
        UserError: an input names nothing, or a file is of no known kind.
    """
    found: list[TextFile] = []
    for item in inputs:
        path = Path(item).expanduser()
        if path.is_dir():
            inside = [_classify(Path(folder) / name) for folder, name in _walk(path)]
            known = [file for file in inside if file is not None]
            if not known:
                raise UserError(f"no {', '.join(FORMATS)} file below {path}", where="input")
            found += known
            continue
        names = [path] if path.exists() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not names:
            raise UserError(f"no such file: {item}", where="input", expected="a file, a folder or a glob that matches")
        for name in names:
            file = _classify(name)
            if file is None:
                raise UserError(
                    f"{name.name!r} is of no known kind",
                    where=str(name),
                    expected=f"a name ending in .{', .'.join(FORMATS)}, or text with .gz or .zst behind",
                )
            found.append(file)
    return found


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        yield from ((directory, name) for name in sorted(names) if name not in DESCRIPTIONS)


def _classify(path: Path) -> TextFile | None:
    parts = path.name.lower().split(".")
    packer = parts.pop() if parts[-1] in PACKERS else ""
    return TextFile(path, parts[-1], packer) if parts[-1] in FORMATS and len(parts) > 1 else None


def read_records(stream: IO[bytes], file: TextFile) -> Iterator[Record]:
    """Records of an opened file: a txt line without the white space around it (blank ones are left out), a json list's
    element, a jsonl line (blank ones are left out).

    Raises:
        UserError: the content is not what the name says; names file and line.
    """
    try:
        if file.format in ("json", "parquet", "arrow"):
            yield from _read_json(stream, file) if file.format == "json" else _read_table(stream, file)
            return
        for number, line in enumerate(stream, 1):
            where = f"{file.path} line {number}"
            if not line.strip():
                continue
            if file.format == "txt":
                yield Record(_decode(line, where).strip(), where, line)
            else:
                yield Record(_parse(line, where), where, line)
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise UserError(f"cannot read the file: {error}", where=str(file.path)) from None


def read_lines(stream: IO[bytes], file: TextFile) -> Iterator[Record]:
    """The documents' literal reading: a txt line stripped, a json element as JSON text, a jsonl line as it stands,
    with its newline, blank or not.

    Raises:
        UserError: as ``read_records``.
    """
    if file.format == "txt":
        yield from read_records(stream, file)
    elif file.format == "json":
        for record in read_records(stream, file):
            yield Record(_ascii_json(record.value), record.where)
    else:
        for number, line in enumerate(stream, 1):
            where = f"{file.path} line {number}"
            yield Record(_decode(line, where), where, line)


def _ascii_json(value: Any) -> str:
    return json.dumps(value)


def _read_json(stream: IO[bytes], file: TextFile) -> Iterator[Record]:
    try:
        start = stream.read(1)
        while start.isspace():
            start = stream.read(1)
        if start != b"[":
            raise UserError(
                f"the file starts with {start.decode('utf-8', 'replace')!r}",
                where=str(file.path),
                expected="a list of records; name the file .jsonl when it has one record a line",
            )
        rest = _Prefixed(b"[", stream)
        for number, value in enumerate(ijson.items(rest, "item", use_float=True), 1):
            yield Record(value, f"{file.path} record {number}")
    except ijson.JSONError as error:
        raise UserError(f"not JSON ({error})", where=str(file.path), expected="a list of records") from None


def _read_table(stream: IO[bytes], file: TextFile) -> Iterator[Record]:
    """Rows of a Hugging Face dataset's files."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "reading it needs pyarrow", where=str(file.path), fix="pip install 'evomesh[streaming]'"
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
                yield Record(row, f"{file.path} row {number}")
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"not a {file.format} file ({error})", where=str(file.path)) from None


def _arrow_batches(stream: IO[bytes], pyarrow: Any) -> Iterator[Any]:
    try:  # what datasets.save_to_disk writes
        yield from pyarrow.ipc.open_stream(stream)
    except pyarrow.ArrowInvalid:
        stream.seek(0)
        reader = pyarrow.ipc.open_file(stream)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


class _Prefixed:
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
        raise UserError(f"byte 0x{line[error.start]:02x} is not UTF-8", where=f"{where} byte {error.start}") from None


def _parse(line: bytes, where: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"the line is not JSON ({error})", where=where, expected="one JSON object a line") from None


def field_text(record: Record, field: str) -> str:
    """The text of a record: a txt line itself, else its field.

    Raises:
        UserError: no such field, or it is no string.
    """
    if isinstance(record.value, str):
        return record.value
    if not isinstance(record.value, dict) or field not in record.value:
        keys = ", ".join(record.value) if isinstance(record.value, dict) else type(record.value).__name__
        raise UserError(
            f"the record has no field {field!r} (it has: {keys or 'none'})",
            where=record.where,
            fix="name the field: --text-field NAME, or encode the whole line: --raw-lines",
        )
    text = record.value[field]
    if not isinstance(text, str):
        raise UserError(f"the field {field!r} is a {type(text).__name__}", where=record.where, expected="a string")
    return text
