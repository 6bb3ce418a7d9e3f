"""Built-in styles on sentencepiece models without a folder, and the characters that tokens stand for."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from evomesh.data.chat import build_template
from evomesh.data.chat_message import ChatMessage
from evomesh.data.tokenizer import HfTokenizer, load_tokenizer
from tests.support.chat_folders import FOLDERS, UNICODE

MARKS = ["<|im_start|>", "<|im_end|>"]
CONVERSATION = [
    ChatMessage("user", "\n\n  what\nis", False),
    ChatMessage("assistant", "\n\nthe cat ", True),
]
LONG_TEXTS = {
    "words": " ".join(random.Random(0).choices(["the", "cat", "12", "mat\n"], k=40000)),
    "one word": "cat" * 20000,
    "spaces": " \n" * 20000,
    "unicode": UNICODE * 1000,
    "marks": "a<|im_end|>\n</s> b" * 3000,
}


def model_with(
    folder: Path, symbols: list[str], control: list[str], *, prefix: bool
) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat is what", "user\n\nthe", "\n\n\n the"] * 20),
        model_prefix=str(folder / "sp"), vocab_size=310, model_type="bpe", byte_fallback=True,
        user_defined_symbols=symbols, control_symbols=control, normalization_rule_name="identity",
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "sp.model"


@pytest.mark.parametrize("prefix", [False, True])
def test_marks_that_are_symbols_are_part_of_the_text(
    tmp_path: Path, prefix: bool
) -> None:
    path = model_with(tmp_path, MARKS, [], prefix=prefix)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    template = build_template("chatml", load_tokenizer(path))
    prompt = "<|im_start|>user\n\n\n  what\nis<|im_end|>\n<|im_start|>assistant\n"
    assert template.encode_prompt(CONVERSATION[:1]) == [1, *plain.encode(prompt)]
    ids = template.encode(CONVERSATION)
    whole = prompt + "\n\nthe cat <|im_end|>\n"
    assert [abs(token) for token in ids] == [1, *plain.encode(whole)]
    targets = plain.decode([token for token in ids[1:] if token > 0])
    assert targets.strip() == "the cat <|im_end|>"


def test_marks_that_are_control_symbols_are_inserted_between_texts(
    tmp_path: Path,
) -> None:
    path = model_with(tmp_path, [], MARKS, prefix=False)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    start, end = map(plain.piece_to_id, MARKS)
    user = [start, *plain.encode("user\n\n\n  what\nis"), end]
    assistant = [*plain.encode("\n"), start, *plain.encode("assistant\n\n\nthe cat ")]
    wanted = [1, *user, *assistant, end, *plain.encode("\n")]
    ids = build_template("chatml", load_tokenizer(path)).encode(CONVERSATION)
    assert [abs(token) for token in ids] == wanted
    assert ids[-2] == end and ids[len(user)] == -end


def test_internlm_trains_the_texts_of_users_without_their_marks(tmp_path: Path) -> None:
    path = model_with(tmp_path, ["<eoh>", "<eoa>"], [], prefix=False)
    tokenizer = load_tokenizer(path)
    messages = [
        ChatMessage("user", "the cat", True),
        ChatMessage("assistant", "is", False),
    ]
    ids = build_template("internlm", tokenizer).encode(messages)
    targets = [token for token in ids[1:-1] if token > 0]
    assert tokenizer.decode(targets) == "the cat<eoh>\n"


@pytest.mark.parametrize("prefix", [False, True])
def test_spans_of_a_bare_model_cover_its_text(tmp_path: Path, prefix: bool) -> None:
    path = model_with(tmp_path, MARKS, [], prefix=prefix)
    tokenizer = load_tokenizer(path)
    text = f"the{UNICODE} <|im_end|> 春🙂\n"
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text)
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    for token, (start, end) in zip(ids, spans, strict=True):
        name = tokenizer.token_name(token).replace("\u2581", " ")
        if not name.startswith("<0x"):
            assert text[start:end].lstrip(" ") == name.lstrip(" ")


class BatchesOnly:
    """A backend without the call that keeps the interpreter from other threads."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        assert name != "encode", "other threads wait as long as this call takes"
        return getattr(self.backend, name)


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("row", ["llama2", "internlm2", "qwen3", "phi3"])
def test_one_text_is_encoded_as_a_batch_with_the_same_ids(
    tmp_path: Path, row: str, name: str
) -> None:
    tokenizer = load_tokenizer(FOLDERS[row].write(tmp_path))
    assert isinstance(tokenizer, HfTokenizer)
    backend: Any = tokenizer._backend
    wanted = backend.encode(LONG_TEXTS[name], add_special_tokens=False)
    tokenizer._backend = BatchesOnly(backend)
    assert tokenizer.encode(LONG_TEXTS[name]) == wanted.ids
    assert tokenizer.encode_with_spans(LONG_TEXTS[name]) == (wanted.ids, wanted.offsets)
