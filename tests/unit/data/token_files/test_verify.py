"""verify finds defects without trusting the meta; repair rebuilds the meta and removes a torn line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from evomesh.cli.data import app
from evomesh.data.token_files import verify as verify_module
from evomesh.data.token_files.repair import repair_path
from evomesh.data.token_files.verify import verify
from evomesh.errors import UserError


def problems(path: Path, **options: Any) -> list[str]:
    _, found = verify(str(path), **options)
    return found


def documents(seed: int = 0, count: int = 40) -> list[list[int]]:
    rng = np.random.RandomState(seed)
    return [rng.randint(1, 90, rng.randint(2, 20)).tolist() for _ in range(count)]


def set_meta(path: Path, rows: Any) -> None:
    with Path(f"{path}.meta").open("wb") as file:
        np.save(file, rows)


def test_an_intact_file_has_no_problems(write_bin: Any) -> None:
    path = write_bin(documents())
    scans, found = verify(str(path), vocab_size=90)
    assert found == []
    assert (scans[0].tokens, len(scans[0].offsets)) == (sum(map(len, documents())), 40)
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert result.exit_code == 0
    assert "no problems found" in result.output


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_that_the_system_does_not_open_is_no_finding(
    write_bin: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The first opening reads the magic bytes, the second the lines: neither tells anything about the data."""
    path = write_bin(documents())
    right, openings = Path.open, []

    def fails(self: Path, *arguments: Any, **named: Any) -> Any:
        if self == path:
            openings.append(self)
            if len(openings) == number:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return right(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises((UserError, PermissionError), match="Permission denied"):
        verify(str(path))


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_the_problems_do_not_depend_on_the_block_size(
    write_bin: Any, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(verify_module, "BLOCK_BYTES", block)
    stored = documents()
    stored[11] = [5, 99, 7]
    stored[20] = [0, -8, 0]
    path = write_bin(stored)
    (scan,), found = verify(str(path), vocab_size=90)
    assert found == [f"{path} line 12: id 99 is outside the vocabulary of 90"]
    assert (scan.max_id, scan.zeros, scan.masked) == (99, 2, 1)
    assert scan.lengths.tolist() == list(map(len, stored))
    assert scan.offsets.tolist() == np.load(f"{path}.meta")[:, 0].tolist()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[30] = b"{}\n"
    path.write_bytes(b"".join([*lines[:35], lines[35][:-9]]))
    byte = sum(map(len, lines[:35])) + len(lines[35]) - 9
    found = problems(path, vocab_size=90)
    assert found[0].endswith("line 12: id 99 is outside the vocabulary of 90")
    assert found[1] == f"{path} line 31: the line has no key tokens (keys found: none)"
    assert f"{path} line 36 byte {byte}: the line is not JSON" in found[2]
    assert "ends in the middle of it" in found[2]


def test_wrong_rows_are_listed_with_the_correct_values(write_bin: Any) -> None:
    path = write_bin(documents())
    right = np.load(f"{path}.meta")
    wrong = right.copy()
    wrong[3, 1] += 1
    wrong[7, 0] -= 2
    set_meta(path, wrong)
    found = problems(path)
    assert len(found) == 2
    assert (
        f"row 3: {tuple(wrong[3].tolist())}, the line has {tuple(right[3].tolist())}"
        in found[0]
    )
    assert "row 7" in found[1]
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert result.exit_code == 1
    assert "2 problems" in result.output
    repair_path(str(path))
    assert problems(path) == []


def test_missing_rows_and_a_missing_meta_are_problems(write_bin: Any) -> None:
    path = write_bin(documents())
    set_meta(path, np.load(f"{path}.meta")[:-2])
    assert any("38 rows, the token file has 40 lines" in one for one in problems(path))
    os.remove(f"{path}.meta")
    assert any("no .meta" in one for one in problems(path))


def test_bad_ids_and_bad_lines_are_problems(write_bin: Any) -> None:
    path = write_bin([[1, 2], [3, 95, -99], [0, 4]])
    scans, found = verify(str(path), vocab_size=90)
    assert found == [f"{path} line 2: id 99 is outside the vocabulary of 90"]
    assert "id 0 occurs 1 times" in scans[0].notes[0]
    path.write_text('{"tokens": [1, 2]}\n{"tokens": [1.5]}\n{"tokens": [1, tru')
    found = problems(path)
    assert "line 2: token 0 is 1.5" in found[0]
    assert "line 3" in found[1]
    assert "ends in the middle" in found[1]
    with pytest.raises(UserError, match="line 2"):
        repair_path(str(path))


def test_a_block_that_was_appended_twice_is_a_problem(write_bin: Any) -> None:
    first, second = documents(1, 30), documents(2, 10)
    path = write_bin(first + second + second)
    assert problems(path) == [
        f"{path}: lines 41 .. 50 repeat lines 31 .. 40: written twice in append mode?"
    ]
    path = write_bin(first + first)
    assert "lines 31 .. 60 repeat lines 1 .. 30" in problems(path)[0]
    path = write_bin([*first, first[3], *second])
    scans, found = verify(str(path))
    assert found == []
    assert "1 document repeats an earlier one" in scans[0].notes[0]


def test_files_with_the_same_documents_are_noted(
    write_bin: Any, tmp_path: Path
) -> None:
    """They may be a copy by mistake, or a source that is to count twice."""
    original = write_bin(documents(1), "train/en/a.bin")
    write_bin(documents(2), "train/en/b.bin")
    write_bin(documents(1)[::-1], "train/en/c.bin")
    copy = write_bin(documents(1), "train/zh/d.bin")
    scans, found = verify(str(tmp_path / "train"))
    assert found == []
    notes = [note for scan in scans for note in scan.notes]
    assert notes == [
        f"{copy}: its 40 documents are those of {original}, in the same order"
    ]


def test_validation_documents_in_training_are_a_problem(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin(documents(1), "train/en/a.bin")
    path = write_bin([*documents(2, 5), documents(1)[4]], "valid/en/a.bin")
    found = problems(tmp_path / "train", valid=str(tmp_path / "valid"))
    assert found == [
        f"{path}: 1 of 6 validation documents are also in training (first: line 6)"
    ]


class CodePointTokenizer:
    """A tokenizer whose ids are code points."""

    vocab_size = 0x110000

    path = Path("tok/tokenizer.json")
    hash = "1" * 64

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_tokenized_json_is_a_problem(write_bin: Any) -> None:
    texts = [f'{{"text": "document {n}"}}' for n in range(20)]
    path = write_bin([[ord(c) for c in text] for text in texts])
    found = problems(path, tokenizer=CodePointTokenizer())
    assert len(found) == 1
    assert "20 of 20 samples read like JSON" in found[0]
    path = write_bin([[ord(c) for c in f"plain text {n}"] for n in range(20)])
    assert problems(path, tokenizer=CodePointTokenizer()) == []


def test_files_of_another_tokenizer_are_one_problem(
    write_bin: Any, tmp_path: Path
) -> None:
    first = write_bin(documents(1), "train/en/a.bin")
    second = write_bin(documents(2), "train/en/b.bin")
    valid = write_bin(documents(3), "valid/en/c.bin")
    tokenizer = CodePointTokenizer()
    options = {"tokenizer": tokenizer, "valid": str(tmp_path / "valid")}
    # InternEvo's tools write no record.
    assert problems(tmp_path / "train", **options) == []
    for path, digit in ((first, "1"), (second, "2"), (valid, "3")):
        record = f'{{"tokenizer": "a.model", "tokenizer_hash": "{digit * 64}"}}'
        Path(f"{path}.json").write_text(record)
    (found,) = problems(tmp_path / "train", **options)
    assert found == (
        f"{second} and 1 more: made with another tokenizer (a.model 222222222222) than tok/tokenizer.json "
        "(111111111111), so the same id stands for different texts"
    )


def test_a_fingerprint_of_another_file_is_a_problem(write_bin: Any) -> None:
    path = write_bin(documents())
    Path(f"{path}.json").write_text('{"documents": 41, "tokens": 3}')
    assert [one.split(": ", 1)[1] for one in problems(path)] == [
        "documents is 41, the token file has 40",
        f"tokens is 3, the token file has {sum(map(len, documents()))}",
    ]


@pytest.mark.parametrize(
    "stored", [[[-3, -4], [-5, -1, -2]], [[7], [8], [6]], [[7, -2], [0, 0], [9]]]
)
def test_a_file_without_a_target_is_a_problem(
    write_bin: Any, tmp_path: Path, stored: list[list[int]]
) -> None:
    bad = write_bin(stored, "d/en/a.bin")
    write_bin([[1, 2]], "d/en/b.bin")
    tokens = sum(map(len, stored))
    (found,) = problems(tmp_path / "d")
    assert found.startswith(f"{bad}: none of {tokens} tokens is a target")
    assert "fix:" in found
    # Validation data is checked alike.
    (found,) = problems(tmp_path / "d/en/b.bin", valid=str(bad))
    assert found.startswith(f"{bad}: none of {tokens} tokens is a target")


def test_a_set_without_a_document_that_is_long_enough_is_a_problem(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1, 2, 3], [1, 2, 4]], "d/en/a.bin")
    write_bin([[4, 5, 6, 7], [4, 5, 6, 8], [4, 5]], "d/en/b.bin")
    write_bin([[1, 8], [2, 8], [3, 8], [4, 8]], "v/en/a.bin")
    write_bin([[1, 8, 9]], "v/cn/a.bin")
    folder = tmp_path / "d"
    assert problems(folder, min_length=3) == []
    assert problems(folder, min_length=4) == [
        f"{folder}/en/a.bin: none of 2 documents has the minimum length of 4 tokens, the longest has 3"
    ]
    assert problems(folder, min_length=5) == [
        f"{folder}: none of 5 documents has the minimum length of 5 tokens, the longest has 4"
    ]
    valid = {"valid": str(tmp_path / "v"), "valid_min_length": 3}
    assert problems(folder, **valid) == [
        "en: none of 4 documents has the minimum length of 3 tokens, the longest has 2"
    ]


def test_a_file_that_is_in_both_sets_is_refused(write_bin: Any, tmp_path: Path) -> None:
    path = write_bin(documents(), "d/valid/a.bin")
    for valid in (path, path.parent, tmp_path / "d"):
        with pytest.raises(UserError, match="in PATH and in --valid") as caught:
            problems(tmp_path / "d", valid=str(valid))
        assert caught.value.fix


def test_a_config_decides_what_is_enough(write_bin: Any, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_bin([[1, 2, n] for n in range(3, 11)], "d/en/a.bin")

    def run(**data: Any) -> tuple[int, str]:
        made = tmp_path / "c.py"
        made.write_text(f"data = {data}\nmodel = dict(vocab_size=90, num_layers=1)\n")
        arguments = ["verify", str(folder), "--config", str(made)]
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.output

    assert run(seq_len=8)[0] == 0
    code, output = run(seq_len=8, min_length=4)
    assert code == 1 and "minimum length of 4 tokens, the longest has 3" in output
    code, output = run(seq_len=64)
    assert code == 1 and "24 tokens in 1 file," in output


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("verify", []),
        ("inspect", []),
        ("show", []),
        ("repair", []),
        ("cache", []),
        ("order", []),
        ("verify", ["--valid", "ELSEWHERE"]),
    ],
)
@pytest.mark.parametrize(
    "kind", ["missing", "missing.bin", "empty", "text", "pipe.bin"]
)
def test_a_path_without_token_files_is_the_user_s_mistake(
    write_bin: Any, tmp_path: Path, command: str, options: list[str], kind: str
) -> None:
    bad = tmp_path / kind
    if kind == "empty":
        bad.mkdir()
    elif kind == "text":
        bad.write_text("no tokens")
    elif kind == "pipe.bin":
        os.mkfifo(bad)
    words = [command, str(bad)]
    if options:
        words = [command, str(write_bin(documents())), "--valid", str(bad)]
    if command == "order":
        words += ["--output", str(tmp_path / "order.txt")]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, UserError) and error.exit_code == 2
    assert str(bad) in str(error)
