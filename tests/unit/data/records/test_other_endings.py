"""Files of any ending: the message of a folder without input files names them, and each may be a document."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.data.records import limits
from evomesh.data.records.reader import SourceRecord, read_records
from evomesh.data.records.source_files import find_source_files, open_files
from evomesh.errors import UserError


def test_endings_that_are_not_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.py", "below/b.py", "c.rst", "LICENSE", ".hidden.md"):
        (tmp_path / name).write_text("text\n")
    with pytest.raises(UserError) as caught:
        find_source_files([str(tmp_path)])
    assert "are not read: .py (2)" in str(caught.value)
    assert ".rst (1)" in str(caught.value) and "no ending (1)" in str(caught.value)
    assert ".md" not in str(caught.value) and "--whole-files" in caught.value.fix


def test_at_most_five_endings_are_shown(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"a.{number}").write_text("text\n")
    with pytest.raises(UserError, match=r"\.4 \(1\), \.\.\.") as caught:
        find_source_files([str(tmp_path)])
    assert ".5" not in str(caught.value)


def test_an_empty_folder_has_no_endings(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_source_files([str(tmp_path)])
    assert "endings" not in str(caught.value)


def documents_of(*inputs: Path) -> list[SourceRecord]:
    files = find_source_files(list(map(str, inputs)), whole=True)
    return [
        record
        for file, stream, _ in open_files(files)
        for record in read_records(stream, file)
    ]


def test_each_file_is_a_document_whatever_its_ending(tmp_path: Path) -> None:
    texts = {
        "a.py": "def f():\n    return 1\n\n",
        "below/README": "two\n\nparagraphs",
        "below/config.json": '{"text": "as it is"}',
        "c.txt": "\ufeffwith a mark\n",
        "d.md.gz": "packed\n",
    }
    (tmp_path / "below").mkdir()
    for name, text in texts.items():
        content = text.encode()
        packed = gzip.compress(content) if name.endswith(".gz") else content
        (tmp_path / name).write_bytes(packed)
    (tmp_path / "blank.rst").write_text(" \n")
    (tmp_path / ".hidden.py").write_text("not read")
    found = {record.where: record.value for record in documents_of(tmp_path)}
    expected = {
        str(tmp_path / name): text.removeprefix("\ufeff")
        for name, text in texts.items()
    }
    assert found == expected


def test_a_whole_file_must_be_text_of_a_bearable_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"picture\.png"):
        documents_of(picture)
    monkeypatch.setattr(limits, "MAX_RECORD_BYTES", 8)
    long = tmp_path / "long.py"
    long.write_text("x" * 9)
    with pytest.raises(UserError, match="longer than"):
        documents_of(long)


def test_an_empty_folder_has_no_whole_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file below"):
        documents_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"), [("openai", "messages"), ("message", "messages")]
)  # fmt: skip
def test_a_format_that_does_not_exist_names_the_one_that_is_meant(
    name: str, meant: str
) -> None:
    words = ["tokenize", "x.jsonl", "-o", "x.bin", "-t", "t", "--format", name]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UserError)
    assert result.exception.fix == f"did you mean {meant}?"
