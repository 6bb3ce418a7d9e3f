"""Read the records of raw input files one at a time, in constant memory."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, AnyStr

import ijson
import orjson

from evomesh.data.records.source_files import READ_ERRORS, SourceFile
from evomesh.data.token_files.lines import json_kind
from evomesh.errors import UserError

UTF8_BOM = (
    b"\xef\xbb\xbf"  # byte order mark, which some systems write in front of a text
)
OTHER_FORMATS = {  # by their first bytes: what it is, and how to fix it
    b"\x1f\x8b": ("compressed with gzip", "give it a name that ends with .gz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "give it a name that ends with .zst"),
    b"\xff\xfe": ("in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
}
TABLE_ROWS = 1024  # rows decoded at once
MAX_LINE_BYTES = 64 * 2**20  # of a line, however small the compressed file is


@dataclass(frozen=True)
class SourceRecord:
    """One record of an input file.

    Attributes:
        value: the text of a txt line, else a parsed JSON value.
        where: file and line (or row) for messages.
        raw: the line as it was read; empty for formats without lines.
    """

    value: Any
    where: str
    raw: bytes = b""


def read_records(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """Yield the records of an opened file: elements of a json list, rows of a table, lines of txt and jsonl.

    Blank lines are skipped; a txt line is stripped.

    Raises:
        UserError: the content is not in the format that the name states; names file and line.
    """
    read = {
        "txt": _read_txt,
        "jsonl": _read_jsonl,
        "json": _read_json,
        "csv": _read_csv,
        "parquet": _read_table,
        "arrow": _read_table,
    }[file.format]
    try:
        yield from read(stream, file)
    except READ_ERRORS as error:
        raise UserError(
            f"cannot read the file: {error}", where=str(file.full_path)
        ) from None


def read_raw_lines(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """Yield lines verbatim, as InternEvo's tokenizer.py reads them.

    A txt line is stripped, an element of a json list becomes JSON text, and any other
    line keeps its newline and is read even if it is blank.

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
            for number, line in enumerate(_bounded_lines(stream, file), 1):
                where = f"{file.full_path} line {number}"
                yield SourceRecord(_decode(line, where), where, line)
        except READ_ERRORS as error:
            raise UserError(
                f"cannot read the file: {error}", where=str(file.full_path)
            ) from None


def _read_txt(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    for line, where in _nonblank_lines(stream, file):
        yield SourceRecord(_decode(line, where).strip(), where, line)


def _read_jsonl(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    for line, where in _nonblank_lines(stream, file):
        yield SourceRecord(_parse_json(line, where), where, line)


def _nonblank_lines(stream: IO[bytes], file: SourceFile) -> Iterator[tuple[bytes, str]]:
    for number, line in enumerate(_bounded_lines(stream, file), 1):
        content = line.removeprefix(UTF8_BOM) if number == 1 else line
        if content.strip():
            yield content, f"{file.full_path} line {number}"


def _bounded_lines(stream: IO[AnyStr], file: SourceFile) -> Iterator[AnyStr]:
    """Yield the lines of a stream.

    Raises:
        UserError: a line is longer than ``MAX_LINE_BYTES``.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"the line is longer than {MAX_LINE_BYTES >> 20} MiB",
                where=f"{file.full_path} line {number}",
                expected="one record per line",
            )
        yield line


def _read_json(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    try:
        start = stream.read(1)
        if start == UTF8_BOM[:1] and stream.read(2) == UTF8_BOM[1:]:
            start = stream.read(1)
        while start.isspace():
            start = stream.read(1)
        if start != b"[":
            raise UserError(
                f"the file starts with {start.decode('utf-8', 'replace')!r}",
                where=str(file.full_path),
                expected="a list of records; if the file has one record per line, name it .jsonl",
            )
        whole = _PrefixedStream(start, stream)
        for number, value in enumerate(ijson.items(whole, "item", use_float=True), 1):
            yield SourceRecord(value, f"{file.full_path} record {number}")
    except ijson.JSONError as error:
        raise UserError(
            f"not JSON ({error})",
            where=str(file.full_path),
            expected="a list of records",
        ) from None


def _read_csv(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """Yield the rows of a csv file; its first line names the fields."""
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    rows = csv.reader(_bounded_lines(text, file), strict=True)
    try:
        names = next(rows, [])
        for row in rows:
            where = f"{file.full_path} line {rows.line_num}"
            if len(row) == len(names):
                yield SourceRecord(dict(zip(names, row, strict=True)), where)
            elif row:  # an empty line is skipped
                raise UserError(
                    f"the row has {len(row)} fields",
                    where=where,
                    expected=f"{len(names)} fields, as in line 1",
                )
    except csv.Error as error:
        raise UserError(
            f"not csv ({error})", where=f"{file.full_path} line {rows.line_num}"
        ) from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"byte 0x{byte:02x} is not UTF-8",
            where=f"{file.full_path} after line {rows.line_num}",
        ) from None


def _read_table(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """Yield the rows of a Hugging Face dataset's parquet or arrow file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"reading .{file.format} files requires pyarrow",
            where=str(file.full_path),
            fix="pip install 'evomesh[streaming]'",
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
                yield SourceRecord(row, f"{file.full_path} row {number}")
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            f"not a valid {file.format} file ({error})", where=str(file.full_path)
        ) from None


def _arrow_batches(stream: IO[bytes], pyarrow: Any) -> Iterator[Any]:
    """Yield the batches of either arrow format: streams (which ``datasets.save_to_disk`` writes) or files."""
    try:
        yield from pyarrow.ipc.open_stream(stream)
    except pyarrow.ArrowInvalid:
        stream.seek(0)
        reader = pyarrow.ipc.open_file(stream)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


class _PrefixedStream:
    """A stream with bytes put back in front."""

    def __init__(self, prefix: bytes, stream: IO[bytes]) -> None:
        self._prefix = prefix
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if size == 0:
            return b""
        prefix = self._prefix
        self._prefix = b""
        return prefix or self._stream.read(size)


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} is not UTF-8"
        fix = "convert the file: iconv -f ENCODING -t UTF-8"
        for start, (kind, fix_of_kind) in OTHER_FORMATS.items():
            if line.startswith(start):
                found += f": the file is {kind}"
                fix = fix_of_kind
        raise UserError(
            found,
            where=f"{where} byte {error.start}",
            expected="text in UTF-8",
            fix=fix,
        ) from None


def _parse_json(line: bytes, where: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _decode(line, where)  # bytes that are no text have a clearer message
        raise UserError(
            f"the line is not JSON ({error})",
            where=where,
            expected="one JSON object per line",
            fix=_json_advice(line),
        ) from None


def _json_advice(line: bytes) -> str:
    """Return how to fix what Python's json writes and reads although JSON has it not; "" for another defect."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return "write null for NaN and Infinity, and no half of a surrogate pair: JSON has neither"


def record_text(record: SourceRecord, field: str) -> str:
    """Return the text of a record: a txt line itself, else the value of its field.

    Raises:
        UserError: the field is missing or not a string.
    """
    if isinstance(record.value, str):
        return record.value
    if not isinstance(record.value, dict):
        raise UserError(
            f"the record is of type {json_kind(record.value)}",
            where=record.where,
            expected=f"an object with the field {field!r}",
            fix="name a file that holds one list of records .json, and one with a record per line .jsonl",
        )
    if field not in record.value:
        keys = ", ".join(record.value)
        raise UserError(
            f"the record has no field {field!r} (it has: {keys or 'none'})",
            where=record.where,
            fix="name the field with --text-field NAME, or encode whole lines with --raw-lines",
        )
    text = record.value[field]
    if not isinstance(text, str):
        raise UserError(
            f"the field {field!r} is of type {json_kind(text)}",
            where=record.where,
            expected="a string",
        )
    return text
