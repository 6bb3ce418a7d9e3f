"""A small file that unpacks to an endless line is refused before it fills the memory."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from evomesh.data.records import limits
from evomesh.data.records.reader import read_raw_lines, read_records
from evomesh.data.records.source_files import find_source_files, open_files
from evomesh.errors import UserError

LIMIT = 1 << 16


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz", "a.txt.zst", "a.csv.zst"]
)
@pytest.mark.parametrize("read", [read_records, read_raw_lines])
def test_an_endless_line_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: object
) -> None:
    monkeypatch.setattr(limits, "MAX_RECORD_BYTES", LIMIT)
    content = b"text\n" * (".csv" in name) + b"{" + b" " * (64 * LIMIT)
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(
        Path(name).suffix, bytes
    )(content)
    (tmp_path / name).write_bytes(packed)
    (file,) = find_source_files([str(tmp_path / name)])
    for source, opened, _ in open_files([file]):
        with pytest.raises(UserError, match="the record is longer than 65,536 bytes"):
            list(read(opened, source))  # type: ignore[operator]
