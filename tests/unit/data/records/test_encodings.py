"""Text in other encodings: read when it is named, and the message about it names it."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evomesh.data.records.encodings import BLOCK_BYTES
from evomesh.data.records.reader import read_raw_lines, read_records
from evomesh.data.records.source_files import find_source_files, open_files
from evomesh.errors import UserError

TEXTS = ["你好，世界", "编码 is 重要的", "第三行 \N{CJK UNIFIED IDEOGRAPH-20000}"]

REPEATS = 10_000  # of the texts in a file of several blocks


def content(kind: str, texts: list[str]) -> str:
    if kind == "csv":
        return "id,text\n" + "".join(f'1,"{text}\n{text}"\n' for text in texts)
    records = [{"text": text} for text in texts]
    if kind == "json":
        return json.dumps(records, ensure_ascii=False, indent=1)
    if kind == "jsonl":
        return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    return "\n".join(texts)


def read(path: Path, encoding: str, reader: object = read_records) -> list[object]:
    found = []
    for file, stream, _ in open_files(find_source_files([str(path)], encoding)):
        found += [record.value for record in reader(stream, file)]  # type: ignore[operator]
    return found


def read_written(
    folder: Path, kind: str, encoding: str, packed: bool
) -> tuple[list[object], int]:
    """Return the records of a file of this encoding, and its bytes before compression."""
    data = content(kind, TEXTS * REPEATS if packed else TEXTS).encode(encoding)
    path = folder / (f"a.{kind}" + ".gz" * packed)
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    return read(path, encoding), len(data)


@pytest.fixture(scope="module")
def in_utf8(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, bool], list[object]]:
    """Return what gives the records of a file in UTF-8, read once for all other encodings."""

    def records(kind: str, packed: bool) -> list[object]:
        return read_written(tmp_path_factory.mktemp("utf8"), kind, "utf-8", packed)[0]

    return functools.cache(records)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-8-sig", "utf-32-le"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_gives_what_it_gives_in_utf8(
    tmp_path: Path,
    in_utf8: Callable[[str, bool], list[object]],
    kind: str,
    encoding: str,
    packed: bool,
) -> None:
    expected = in_utf8(kind, packed)
    found, size = read_written(tmp_path, kind, encoding, packed)
    assert found == expected
    assert (size > BLOCK_BYTES) is packed  # characters are split between blocks
    if kind != "csv":
        assert len(expected) == len(TEXTS) * (REPEATS if packed else 1)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["gb18030", "big5"])
@pytest.mark.parametrize("reader", [read_records, read_raw_lines])
def test_the_fix_names_an_encoding_that_reads_the_file(
    tmp_path: Path, kind: str, encoding: str, reader: object
) -> None:
    if kind == "csv" and reader is read_raw_lines:
        kind = "txt"
    path = tmp_path / f"a.{kind}"
    texts = ["這是一個測試", "中文"]
    path.write_bytes(content(kind, ["plain", *texts]).encode(encoding))
    with pytest.raises(UserError, match="is not UTF-8") as caught:
        read(path, "utf-8", reader)
    assert str(path) in caught.value.where
    assert "--encoding " in caught.value.fix and "data.encoding" in caught.value.fix
    suggested = caught.value.fix.split("--encoding ")[1].split()[0]
    read(path, suggested, reader)


def test_bytes_that_the_encoding_lacks_are_named_with_their_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("一\n二\n".encode("gb18030") * 70_000 + b"\xff\xff\n")
    with pytest.raises(UserError) as caught:
        read(path, "gb18030")
    assert caught.value.where == f"{path} line 140001"
    assert caught.value.found == "byte 0xff is not gb18030"
    assert "--encoding" in caught.value.fix


@pytest.mark.parametrize("name", ["klingon", "hex", "undefined", "", "a\0b"])
def test_an_unknown_encoding_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="no encoding") as caught:
        read(tmp_path / "a.txt", name)
    assert caught.value.where == "--encoding"


def test_bytes_in_the_middle_of_a_list_are_named_with_their_record(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a, b"}, ["c", "d"], "\xb8\xc4"]')
    with pytest.raises(UserError) as caught:
        read(path, "utf-8")
    assert caught.value.where == f"{path} record 3"
