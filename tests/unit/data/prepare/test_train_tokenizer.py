"""Tokenizers that are trained here: read by the libraries themselves, lossless, with special tokens that hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.data.chat import build_template
from evomesh.data.chat_message import ChatMessage
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError

SENTENCE = "the cat sat on a mat and the dog saw the cat that sat there while rain fell on the roof"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[n % 7 :: 1 + n % 3]) + f" {n}" for n in range(400)]
HARD = [
    "  two  spaces\n\ttab",
    "naïve café 春眠不觉晓 🏔️",
    "<|im_start|>user\nthe cat<|im_end|>",
    "\x00\u200b",
    "",
]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["tokenizer", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/{en,code}/x.jsonl, and a tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, texts in (
        ("en", TEXTS),
        ("code", [f"x_{n} = [{n}, y({n})]" for n in range(100)]),
    ):
        (folder / "raw" / kind).mkdir(parents=True)
        rows = [json.dumps({"body": text}) for text in texts]
        (folder / "raw" / kind / "x.jsonl").write_text("\n".join(rows))
    for kind in ("bpe", "sentencepiece"):
        options = [
            "--vocab-size",
            "340",
            "--kind",
            kind,
            "--chat",
            "chatml",
            "--special",
            "<tool>",
        ]
        out = run(
            "train",
            str(folder / "raw"),
            "-o",
            str(folder / kind),
            *options,
            "--text-field",
            "body",
        )
        assert "340 ids" in out
    return folder


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
class TestTrained:
    def test_every_text_comes_back(self, folder: Path, kind: str) -> None:
        tokenizer = load_tokenizer(folder / kind)
        for text in [*TEXTS, *HARD]:
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_marks_are_single_tokens_and_text_merges(
        self, folder: Path, kind: str
    ) -> None:
        tokenizer = load_tokenizer(folder / kind)
        for mark in ("<|im_start|>", "<|im_end|>", "<tool>", "<s>", "</s>"):
            number = tokenizer.token_id(mark)
            assert number is not None
            assert mark in ("<s>", "</s>") or number in tokenizer.encode(
                f"the {mark} cat"
            )
        assert (tokenizer.bos_id, tokenizer.eos_id) == (
            tokenizer.token_id("<s>"),
            tokenizer.token_id("</s>"),
        )
        # Words of the texts became tokens.
        assert len(tokenizer.encode("the cat sat")) <= 4

    def test_a_second_training_does_not_replace_it(
        self, folder: Path, kind: str
    ) -> None:
        with pytest.raises(UserError, match="datasets made with it"):
            run(
                "train",
                str(folder / "raw"),
                "-o",
                str(folder / kind),
                "--vocab-size",
                "340",
            )


def test_the_libraries_read_the_files(folder: Path) -> None:
    ids = load_tokenizer(folder / "bpe").encode("the dog saw")
    assert (
        tokenizers.Tokenizer.from_file(str(folder / "bpe/tokenizer.json"))
        .encode("the dog saw")
        .ids
        == ids
    )
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "sentencepiece/tokenizer.model")
    )
    assert processor.encode("the dog saw") == load_tokenizer(
        folder / "sentencepiece"
    ).encode("the dog saw")
    assert processor.vocab_size() == 340


def test_a_line_longer_than_sentencepieces_limit_is_learned_from(
    tmp_path: Path,
) -> None:
    """Its default would skip the line, and with it the only text."""
    (tmp_path / "long.txt").write_text("abcabd " * 20000)
    run(
        "train",
        str(tmp_path / "long.txt"),
        "-o",
        str(tmp_path / "t"),
        "--vocab-size",
        "266",
        "--kind",
        "sentencepiece",
    )
    assert len(load_tokenizer(tmp_path / "t").encode("abcabd " * 10)) <= 45


def test_inspect_measures_by_kind_of_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "bpe")
    rows = {
        line.split()[0]: line.split()[1:]
        for line in run(
            "inspect", str(folder / "bpe"), str(folder / "raw"), "--text-field", "body"
        ).splitlines()
    }
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert rows["en"][:2] == ["400", f"{size:,}"]
    assert float(rows["en"][2]) == pytest.approx(size / tokens, abs=5e-4)
    assert rows["code"][0] == "100"


def test_compare(folder: Path, tmp_path: Path) -> None:
    whole = {
        "model": {
            "type": "WordLevel",
            "vocab": {"[UNK]": 0, "cat": 1},
            "unk_token": "[UNK]",
        }
    }
    bare = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], **whole})
    )
    (tmp_path / "word").mkdir()
    bare.save(str(tmp_path / "word/tokenizer.json"))
    out = run(
        "compare",
        str(folder / "bpe"),
        str(tmp_path / "word"),
        str(folder / "raw/en"),
        "--text-field",
        "body",
    )
    assert "warning" in out and "does not restore 400 of 400 texts" in out
    assert "-" in out.splitlines()[-1] and out.splitlines()[-1].endswith(
        f"compared with {folder / 'bpe'}"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (["--vocab-size", "200"], "at least 258"),
        (["--vocab-size", "90000"], "the texts give only"),
        (
            ["--vocab-size", "90000", "--kind", "sentencepiece"],
            "sentencepiece cannot learn 90000",
        ),
        (["--vocab-size", "300", "--kind", "word"], "no kind 'word'"),
        (["--vocab-size", "300", "--chat", "alpaca"], "no chat template 'alpaca'"),
        (
            ["--vocab-size", "300", "--text-field", "text"],
            r"no field 'text'(?s:.*)holds the text: --text-field NAME$",
        ),
    ],
)
def test_mistakes_write_nothing(
    folder: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    arguments = ["--text-field", "body", *options]
    with pytest.raises(UserError, match=words):
        run("train", str(folder / "raw"), "-o", str(tmp_path / "new"), *arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("chat", ["chatml", "llama3"])
@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_the_folder_has_the_chat_template_of_its_marks(
    folder: Path, tmp_path: Path, kind: str, chat: str
) -> None:
    """With transformers, it gives the ids of the built-in style, and the answers are the same targets."""
    options = ["--vocab-size", "340", "--kind", kind, "--chat", chat]
    options += ["--text-field", "body"]
    run("train", str(folder / "raw"), "-o", str(tmp_path / "tok"), *options)
    theirs = transformers.AutoTokenizer.from_pretrained(
        str(tmp_path / "tok"), local_files_only=True
    )
    tokenizer = load_tokenizer(tmp_path / "tok")
    style = build_template(chat, tokenizer)
    turns = [
        {"role": "system", "content": "be\nbrief"},
        {"role": "user", "content": "the cat 12 é"},
        {"role": "assistant", "content": "sat"},
    ]
    messages = [
        ChatMessage(turn["role"], turn["content"], turn["role"] == "assistant")
        for turn in turns
    ]
    found = theirs.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert found == [abs(token) for token in style.encode(messages)]
    prompt = theirs.apply_chat_template(
        turns[:2], add_generation_prompt=True, return_dict=True
    )
    assert prompt["input_ids"] == style.encode_prompt(messages[:2])
    own = build_template("tokenizer", tokenizer).encode(messages)
    answer = tokenizer.decode([token for token in own if token > 0])
    assert answer.startswith("sat<|e") or answer == "sat<|im_end|>\n"


def test_marks_without_a_template_leave_none(folder: Path, tmp_path: Path) -> None:
    """The fragments of InternLM's style are encoded apart, as no template can."""
    options = ["--vocab-size", "340", "--chat", "internlm", "--text-field", "body"]
    run("train", str(folder / "raw"), "-o", str(tmp_path / "tok"), *options)
    assert load_tokenizer(tmp_path / "tok").chat_template == ""
