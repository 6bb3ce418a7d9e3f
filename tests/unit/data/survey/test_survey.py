"""``evomesh data report``: its figures against plain counting on small folders."""

from __future__ import annotations

import gzip
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.data.survey.documents import TextFolder, TokenFolder, open_folder
from evomesh.data.survey.frequencies import TokenCounts, _readable_name
from evomesh.data.survey.scripts import LanguageCounts, script_of, words_of
from evomesh.data.survey.survey import histogram_of, survey_of
from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.errors import UserError

WORDS = ("<unk>", "the", "cat", "sat", "on", "mat", "dog", "zebra")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A tokenizer of whole words: the id of each is its place in ``WORDS``."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(path)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines), "utf-8")


def figures_of(
    path: Path, tokenizer: Tokenizer | None = None, tokens: int = 0
) -> dict[str, Any]:
    folder = open_folder(str(path), "text", tokenizer, tokens)
    return survey_of(folder, tokenizer, None)


def test_token_files_against_plain_counting(
    tmp_path: Path, write_bin: Any, tokenizer: Tokenizer
) -> None:
    english = [[1, 2, 3], [1, -6, -3, 4, 1, 5], [1, 2, 3], [7]]
    chinese = [[0, 0, 2], [1, 2, 3]]
    write_bin(english, "train/en/a.bin")
    write_bin(chinese, "train/cn/b.bin")
    figures = figures_of(tmp_path / "train", tokenizer)
    documents = chinese + english
    ids = Counter(abs(token) for document in documents for token in document)
    assert figures["read"]["is_complete"]
    assert figures["read"]["of_documents"] == len(documents)
    assert figures["read"]["of_units"] == ids.total()
    tokens = figures["tokens"]
    top = {row["id"]: (row["count"], row["name"]) for row in tokens["top"]}
    assert top == {token: (count, WORDS[token]) for token, count in ids.items()}
    assert [row["count"] for row in tokens["top"]] == sorted(ids.values())[::-1]
    assert (tokens["unused"], tokens["unused_shown"]) == (0, [])
    assert tokens["unknown"] == pytest.approx(2 / ids.total())
    assert tokens["masked"] == pytest.approx(2 / ids.total())
    # "the cat sat": the same in another file, and its text is shown.
    (group,) = figures["exact"]["rows"]
    assert (group["size"], group["units"], group["text"]) == (3, 6, "the cat sat")
    places = ["cn/b.bin:1", "en/a.bin:0", "en/a.bin:2"]
    assert group["places"] == places
    texts = [" ".join(WORDS[abs(t)] for t in document) for document in documents]
    size = sum(len(text) for text in texts)
    fertility = {"value": pytest.approx(size / ids.total()), "is_exact": False}
    assert tokens["fertility"] == fertility
    latin = sum(character.isalpha() for text in texts for character in text)
    scripts = {row["script"]: row["characters"] for row in figures["scripts"]}
    assert scripts["Latin"] == latin
    types = {row["type"]: row for row in figures["types"]}
    assert types["en"]["documents"] == 4
    assert types["en"]["quantiles"][0] == 1
    assert types["en"]["quantiles"][-1] == 6
    assert types["cn"]["share"] == pytest.approx(6 / ids.total())
    assert {row["text"] for row in figures["samples"]} <= set(texts)


def test_a_single_token_file(tmp_path: Path, write_bin: Any) -> None:
    path = write_bin([[1, 2, 3]])
    figures = figures_of(path)
    assert [row["type"] for row in figures["types"]] == ["a.bin"]
    assert figures["read"]["of_documents"] == 1


def test_unused_and_foreign_tokens(tokenizer: Tokenizer) -> None:
    counts = TokenCounts()
    counts.add(np.array([1, 1, 2, 9, 2**40]), 0)
    counts.add(np.array([], np.int64), 0)
    figures = counts.figures(tokenizer)
    assert figures["unused_shown"] == ["<unk>", *WORDS[3:]]
    assert figures["outside"] == 2
    assert figures["total"] == 5
    assert figures["curve"] == {"rank": [1, 2, 3], "count": [2, 1, 1]}


def test_a_part_of_large_files_is_read_evenly(tmp_path: Path, write_bin: Any) -> None:
    documents = [[n] * 10 for n in range(1, 1001)]
    write_bin(documents, "train/en/a.bin")
    write_bin(documents[:200], "train/cn/b.bin")
    folder = TokenFolder(str(tmp_path / "train"), 2400)
    figures = survey_of(folder, None, None)
    read = figures["read"]
    assert not read["is_complete"]
    assert (read["documents"], read["of_documents"]) == (240, 1200)
    assert read["share"] == pytest.approx(0.2)
    # Lengths and types stay those of all.
    assert figures["lengths"]["documents"][4] == 1200
    assert [row["documents"] for row in figures["types"]] == [200, 1000]
    read_ids = [int(document.units[0]) for document in folder.documents()]
    assert (read_ids[0], read_ids[-1]) == (1, 1000)
    picked = folder.pick([0, 39, 40, 239])
    assert {n: int(one.units[0]) for n, one in picked.items()} == {
        n: read_ids[n] for n in (0, 39, 40, 239)
    }
    # Without a tokenizer there is no text.
    assert figures["scripts"] == []
    assert figures["samples"][0]["text"].split()[0].isdigit()


def test_raw_text_with_and_without_a_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    root = tmp_path / "raw"
    write_jsonl(root / "en" / "a.jsonl", ["the cat sat", "the dog", "THE dog", "x y"])
    write_jsonl(root / "cn" / "b.jsonl", ["the dog", "貓坐在墊子上"])
    with gzip.open(root / "cn" / "c.txt.gz", "wt") as file:
        file.write("on the mat\n\non the mat\n")
    plain = figures_of(root)
    assert plain["unit"] == "bytes"
    assert plain["similar_unit"] == "words"
    assert "tokens" not in plain
    texts = ["the dog", "貓坐在墊子上", "on the mat", "on the mat"]
    texts += ["the cat sat", "the dog", "THE dog", "x y"]
    size = sum(len(text.encode()) for text in texts)
    assert plain["read"]["of_units"] == size
    # Another case is another document, though its words are the same.
    groups = {row["text"]: row["places"] for row in plain["exact"]["rows"]}
    assert groups == {
        "the dog": ["cn/b.jsonl line 1", "en/a.jsonl line 2"],
        "on the mat": ["cn/c.txt.gz line 1", "cn/c.txt.gz line 3"],
    }
    assert len(plain["near"]["rows"]) == 1
    encoded = figures_of(root, tokenizer)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert encoded["tokens"]["total"] == tokens
    assert encoded["tokens"]["fertility"] == {"value": size / tokens, "is_exact": True}
    scripts = {row["script"]: row["characters"] for row in encoded["scripts"]}
    assert scripts["Han"] == 6


def test_of_large_raw_files_the_beginnings_are_read(tmp_path: Path) -> None:
    texts = [f"text number {n:06}" for n in range(500)]
    write_jsonl(tmp_path / "raw" / "a.jsonl", texts)
    write_jsonl(tmp_path / "raw" / "b.jsonl", texts[:100])
    folder = open_folder(str(tmp_path / "raw"), "text", None, 300)
    figures = survey_of(folder, None, None)
    assert not figures["read"]["is_complete"]
    assert figures["read"]["share"] is None
    read = [document.text for document in folder.documents()]
    count = read.index(texts[0], 1)  # of the first file
    assert read == texts[:count] + texts[: len(read) - count]
    assert 45 < count < 60  # 1,200 bytes by the files' sizes, 18 each
    assert 8 < len(read) - count < 13


def test_scripts_are_those_of_unicode() -> None:
    regex = pytest.importorskip("regex")
    names = ("Latin", "Greek", "Cyrillic", "Han", "Hiragana", "Hangul", "Arabic")
    names += ("Thai", "Hebrew", "Devanagari", "Georgian", "Khmer")
    patterns = {name: regex.compile(rf"\p{{Script={name}}}") for name in names}
    checked: Counter[str] = Counter()
    wrong = []
    for code in (*range(0x20, 0x3400), *range(0x3400, 0x30000, 11)):
        character = chr(code)
        if unicodedata.category(character) not in ("Lu", "Ll", "Lo"):
            continue
        for name, pattern in patterns.items():
            is_in = bool(pattern.match(character))
            checked[name] += is_in
            if is_in != (script_of(character) == name):
                wrong.append(f"U+{code:04X} {unicodedata.name(character, '')} {name}")
    assert all(count > 30 for count in checked.values())
    # A sign of several scripts.
    assert wrong == ["U+3006 IDEOGRAPHIC CLOSING MARK Han"]
    assert script_of("7") == script_of("٣") == "digits"
    assert (script_of(" "), script_of("\n"), script_of("。")) == (
        "spaces",
        "spaces",
        "punctuation",
    )


def test_words() -> None:
    assert words_of("Don't stop, 猫が come") == [
        "Don", "'", "t", "stop", ",", "猫", "が", "come",
    ]  # fmt: skip


def test_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("py3langid")
    counts = LanguageCounts()
    counts.add("The house is on the hill, and the children are at school today.")
    counts.add("Das Haus steht auf dem Berg, und die Kinder sind heute in der Schule.")
    counts.add("这座房子在山上，孩子们今天在学校。")
    counts.add("12345 !!!")  # has no language
    rows = {row["language"]: row["texts"] for row in counts.rows()}
    assert rows == {"en": 1, "de": 1, "zh": 1}
    monkeypatch.setitem(sys.modules, "py3langid", None)
    absent = LanguageCounts()
    absent.add("The house")
    assert (absent.is_available, absent.rows()) == (False, [])


def test_histogram() -> None:
    lengths = np.array([0, 1, 1, 2, 3, 4, 1000])
    found = histogram_of(lengths)
    expected: Counter[int] = Counter()
    for length in lengths.tolist():
        start = 0 if length == 0 else 2 ** (length.bit_length() - 1)
        expected[start] += 1
    shown = dict(zip(found["starts"], found["documents"], strict=True))
    assert {start: n for start, n in shown.items() if n} == dict(expected)
    assert sum(found["units"]) == lengths.sum()
    assert found["units"][-1] == 1000


def test_the_command_writes_one_page(
    tmp_path: Path, write_bin: Any, tokenizer: Tokenizer
) -> None:
    write_bin([[1, 2, 3]] * 40)
    config = tmp_path / "config.py"
    config.write_text(
        f"model = dict(vocab_size=8)\n"
        f"data = dict(seq_len=16, micro_bsz=2, tokenizer_path={str(tokenizer.path)!r})\n"
    )
    out = tmp_path / "out.html"
    arguments = ["data", "report", str(tmp_path / "train"), str(out)]
    result = CliRunner().invoke(
        app, [*arguments, "--config", str(config)], catch_exceptions=False
    )
    assert result.exit_code == 0
    found = re.search(r'id="payload">(.*?)</script>', out.read_text(), re.S)
    assert found is not None
    payload = json.loads(found[1])
    assert payload["tokenizer"] == str(tokenizer.path)
    (row,) = [row for row in payload["packing"] if row["is_config"]]
    assert (row["pack"], row["packs"], row["dropped"]) == (32, 3, 24)
    assert payload["exact"]["repeats"] == 39


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.html").mkdir()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text('{"content": "x"}\n')
    for folder, out, message in (
        ("empty", "out.html", "no token file and no text file below the folder"),
        ("absent", "out.html", "cannot read it: No such file"),
        ("empty", "out.txt", "expected a file whose name ends with .html"),
        ("empty", "x.html", "is a folder"),
        ("raw", "out.html", "has no field 'text' (it has: content)"),
    ):
        arguments = ["data", "report", str(tmp_path / folder), str(tmp_path / out)]
        with pytest.raises(UserError) as error:
            CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert message.removeprefix("expected ") in str(error.value)
    assert not (tmp_path / "out.html").exists()


def test_files_of_another_tokenizer_are_named(
    tmp_path: Path, write_bin: Any, tokenizer: Tokenizer
) -> None:
    other = write_bin([[1, 2]])
    Path(f"{other}.json").write_text(json.dumps({"tokenizer_hash": "other"}))
    write_bin([[1, 2]], "train/en/b.bin")
    figures = figures_of(tmp_path / "train", tokenizer)
    assert figures["other_tokenizer"] == ["en/a.bin"]


def test_a_text_folder_has_no_packs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    folder = open_folder(str(tmp_path / "a.jsonl"), "text", None, 0)
    assert isinstance(folder, TextFolder)
    assert "packing" not in survey_of(folder, None, None)


def test_tokens_of_bytes_are_shown_as_text(tmp_path: Path) -> None:
    texts = ["的 cat\n"] * 4
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        min_frequency=2,
        initial_alphabet=alphabet,
        special_tokens=["<s>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    names = {
        loaded.token_name(number): _readable_name(loaded, number)
        for number in range(loaded.vocab_size)
    }
    # The bytes of 的 are one token; one of them alone is no character.
    assert names["çļĦ"] == "的"
    assert names["ç"] == "ç"
    assert names["Ġcat"] == "␣cat"
    assert names["Ċ"] == "↵"
    assert names["<s>"] == "<s>"
