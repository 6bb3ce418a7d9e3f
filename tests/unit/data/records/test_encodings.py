"""Text in other encodings: read when it is named, and the message about it names it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from evomesh.data.records.reader import read_raw_lines, read_records
from evomesh.data.records.source_files import find_source_files, open_files
from evomesh.errors import UserError

TEXTS = ["你好，世界", "编码 is 重要的", "第三行 \N{CJK UNIFIED IDEOGRAPH-20000}"]


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


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-8-sig", "utf-32-le"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_gives_what_it_gives_in_utf8(
    tmp_path: Path, kind: str, encoding: str, packed: bool
) -> None:
    text = content(kind, TEXTS * 20_000 if packed else TEXTS)
    name = f"a.{kind}" + ".gz" * packed
    for folder, used in (("plain", "utf-8"), ("other", encoding)):
        data = text.encode(used)
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(
            gzip.compress(data, 1) if packed else data
        )
    expected = read(tmp_path / "plain" / name, "utf-8")
    assert read(tmp_path / "other" / name, encoding) == expected
    if kind != "csv":
        assert len(expected) == len(TEXTS) * (20_000 if packed else 1)


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
