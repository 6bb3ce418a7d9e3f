"""Read the records of raw input files one at a time, in constant memory."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, AnyStr

import orjson

from evomesh.data.records import limits
from evomesh.data.records.encodings import not_utf8
from evomesh.data.records.json_stream import read_elements
from evomesh.data.records.limits import UnpackLimitError
from evomesh.data.records.source_files import READ_ERRORS, WHOLE_FILE, SourceFile
from evomesh.data.token_files.lines import json_kind
from evomesh.errors import UserError

UTF8_BOM = codecs.BOM_UTF8  # which some systems write in front of a text
TABLE_ROWS = 1024  # rows decoded at once


@dataclass(frozen=True)
class SourceRecord:
    """One record of an input file.

    Attributes:
        value: the text of a txt line or of a whole file, else a parsed JSON value.
        where: file and line (or row) for messages.
        raw: the line as it was read; empty for formats without lines.
    """

    value: Any
    where: str
    raw: bytes = b""


def read_records(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """Yield the records of an opened file: elements of a json list, rows of a table, lines of txt and jsonl.

    Blank lines are skipped; a txt line is stripped. A whole file is one record as it
    is, or none if it is blank.

    Raises:
        UserError: the content is not in the format that the name states, or a record is larger than ``limits`` allow;
            names file and line.
    """
    read = {
        "txt": _read_txt,
        "jsonl": _read_jsonl,
        "json": _read_json,
        "csv": _read_csv,
        "parquet": _read_table,
        "arrow": _read_table,
        WHOLE_FILE: _read_whole,
    }[file.format]
    yield from _with_place(read(stream, file), file)


def _with_place(
    records: Iterator[SourceRecord], file: SourceFile
) -> Iterator[SourceRecord]:
    """Yield records; an error of the stream below them becomes a message that names the last good one."""
    place = str(file.full_path)
    try:
        for record in records:
            yield record
            place = f"after {record.where}"
    except UnpackLimitError:
        raise file.unpacks_too_far(place) from None
    except READ_ERRORS as error:
        raise UserError(
            f"cannot read the file: {error}",
            where=place,
            expected="a complete file",
            fix="copy or download it again",
            code="EVO-DATA-009",
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
            text = json.dumps(record.value)
            yield SourceRecord(text, record.where)
    else:
        lines = _raw_lines(stream, file)
        yield from _with_place(lines, file)


def _raw_lines(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    for number, line in enumerate(_bounded_lines(stream, file), 1):
        where = f"{file.full_path} line {number}"
        yield SourceRecord(_decode(line, where), where, line)


def _read_txt(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    for line, where in _nonblank_lines(stream, file):
        yield SourceRecord(_decode(line, where).strip(), where, line)


def _read_whole(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    where = str(file.full_path)
    most = limits.MAX_RECORD_BYTES
    content = stream.read(most + 1)
    if len(content) > most:
        raise limits.record_too_long(where)
    content = content.removeprefix(UTF8_BOM)
    text = _decode(content, where)
    is_blank = not text.strip()
    if not is_blank:
        yield SourceRecord(text, where)


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
        UserError: a line is longer than a record may be.
    """
    number = 0
    while line := stream.readline(limits.MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > limits.MAX_RECORD_BYTES:
            raise limits.record_too_long(f"{file.full_path} line {number}")
        yield line


def _read_json(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    path = str(file.full_path)
    for number, value in enumerate(read_elements(stream, path), 1):
        yield SourceRecord(value, f"{path} record {number}")


class _RowLines:
    """The lines of a csv file, for csv's reader, which joins those of a quoted field without a limit.

    Attributes:
        first_line: number of the line that the current row starts at.
    """

    def __init__(self, text: IO[str], file: SourceFile) -> None:
        self._lines = _bounded_lines(text, file)
        self._path = file.full_path
        self._read = 0  # lines
        self._row_length = 0  # characters of the current row
        self.first_line = 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._read += 1
        self._row_length += len(line)
        if self._row_length > limits.MAX_RECORD_BYTES:
            fix = "a quote that is opened there is probably never closed: close or double it"
            raise limits.record_too_long(self.where, fix)
        return line

    @property
    def where(self) -> str:
        return f"{self._path} line {self.first_line}"

    def start_row(self) -> None:
        """Note that a row is complete."""
        self.first_line = self._read + 1
        self._row_length = 0


def _read_csv(stream: IO[bytes], file: SourceFile) -> Iterator[SourceRecord]:
    """Yield the rows of a csv file; its first line names the fields."""
    csv.field_size_limit(limits.MAX_RECORD_BYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    lines = _RowLines(text, file)
    rows = csv.reader(lines, strict=True)
    try:
        names = next(rows, [])
        lines.start_row()
        for row in rows:
            where = f"{file.full_path} line {rows.line_num}"
            if len(row) == len(names):
                yield SourceRecord(dict(zip(names, row, strict=True)), where)
            elif row:  # an empty line is skipped
                raise UserError(
                    f"the row has {len(row)} fields",
                    where=where,
                    expected=f"{len(names)} fields, as in line 1",
                    fix="quote fields that contain commas or line breaks, double the quotes inside them, "
                    "and separate fields by commas",
                    code="EVO-DATA-009",
                )
            lines.start_row()
    except csv.Error as error:
        raise UserError(
            f"not csv ({error})",
            where=lines.where,
            expected="fields separated by commas; quotes inside a quoted field are doubled",
            fix="close or double the quotes of the row that starts there",
            code="EVO-DATA-009",
        ) from None
    except UnicodeDecodeError as error:
        where = f"{file.full_path} after line {rows.line_num}"
        raise not_utf8(error.object, error, where) from None


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
            code="EVO-CLI-007",
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
            f"not a valid {file.format} file ({error})",
            where=str(file.full_path),
            fix="copy or download it again",
            code="EVO-DATA-009",
        ) from None
    except UnicodeDecodeError as error:
        where = f"{file.full_path} after row {number}"
        raise not_utf8(error.object, error, where) from None


def _arrow_batches(stream: IO[bytes], pyarrow: Any) -> Iterator[Any]:
    """Yield the batches of either arrow format: streams (which ``datasets.save_to_disk`` writes) or files."""
    try:
        yield from pyarrow.ipc.open_stream(stream)
    except pyarrow.ArrowInvalid:
        stream.seek(0)
        reader = pyarrow.ipc.open_file(stream)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(line, error, f"{where} byte {error.start}") from None


def _parse_json(line: bytes, where: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _decode(line, where)
        # orjson has its own limit of nesting, which is above ours.
        if "recursion" in str(error).lower():
            raise limits.record_too_deep(where) from None
        raise UserError(
            f"the line is not JSON ({error})",
            where=where,
            expected="one JSON object per line",
            fix=_json_advice(line),
            code="EVO-DATA-009",
        ) from None


def _json_advice(line: bytes) -> str:
    """Return how to fix a value that Python's json accepts and JSON does not have, or any other defect."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return "correct the line; if the file is one JSON list, name it .json"
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
            code="EVO-DATA-010",
        )
    if field not in record.value:
        keys = ", ".join(record.value)
        raise UserError(
            f"the record has no field {field!r} (it has: {keys or 'none'})",
            where=record.where,
            fix="name the field that holds the text: --text-field NAME",
            code="EVO-DATA-010",
        )
    text = record.value[field]
    if not isinstance(text, str):
        raise UserError(
            f"the field {field!r} is of type {json_kind(text)}",
            where=record.where,
            expected="a string",
            fix="name the field that holds the text: --text-field NAME",
            code="EVO-DATA-010",
        )
    return text
