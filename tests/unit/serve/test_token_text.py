"""Bytes of tokens: joined, they are the UTF-8 of the text, for tokenizers of every kind."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.generate.engine import GeneratedToken, TokenScore
from evomesh.serve.detokenizer import Detokenizer, ScoredToken
from evomesh.serve.token_text import TokenTexts
from tests.support.serving import byte_tokenizer

KINDS = (
    "bytes",
    "byte-level",
    "byte-fallback",
    "metaspace",
    "wordpiece",
    "sentencepiece",
)
SENTENCES = [
    "the cat sat on the mat",
    "naïve café über alles",
    "中文 and 日本語",
    "emoji 🙂 and 🙃",
    "  two  spaces",
] * 20


def build_tokenizer(kind: str, folder: Path) -> Tokenizer:
    if kind == "bytes":
        return load_tokenizer(byte_tokenizer(folder, ""))
    if kind == "sentencepiece":
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=model,
            vocab_size=380,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.98,
            minloglevel=2,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        return load_tokenizer(folder / "tokenizer.model")
    backend = Backend(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=380, show_progress=False)
    if kind == "byte-level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=380,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind == "byte-fallback":  # as in tokenizer.json files made from Llama's
        backend = Backend(models.BPE(byte_fallback=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=380,
            show_progress=False,
            special_tokens=[f"<0x{byte:02X}>" for byte in range(256)],
        )
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    else:
        backend = Backend(
            models.WordPiece(
                {"the": 0, "cat": 1, "##s": 2, "sat": 3, "[UNK]": 4}, unk_token="[UNK]"
            )
        )
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece()
    if kind != "wordpiece":
        backend.train_from_iterator(SENTENCES, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return build_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


def scored_answer(
    tokenizer: Tokenizer, prompt: list[int], answer: list[int]
) -> tuple[str, list[ScoredToken]]:
    """Return the text of an answer and its scored tokens, pushed one by one."""
    detokenizer = Detokenizer(tokenizer, prompt)
    deltas = []
    for number, token in enumerate(answer):
        finish = "length" if number == len(answer) - 1 else ""
        deltas.append(
            detokenizer.push(GeneratedToken(0, token, -0.5, [(token, -0.5)], finish))
        )
    return "".join(delta.text for delta in deltas), [
        one for delta in deltas for one in delta.scored
    ]


MARK = "\ufffd"  # what decoders write for bytes that are no character


def without_marks(text: str) -> str:
    return text.replace(MARK, "")


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="the cats ab,é中🙂 ", min_size=1, max_size=30))
def test_the_bytes_of_a_text_are_its_utf8(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    if not ids:
        return
    prompt = tokenizer.encode("the cat")
    written, scored = scored_answer(tokenizer, prompt, ids)
    assert len(scored) == len(ids)
    assert b"".join(one.content for one in scored) == written.encode()
    whole = tokenizer.decode(prompt + ids)
    assert tokenizer.decode(prompt) + written == whole


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_bytes_of_any_tokens_read_as_the_text(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Characters may be incomplete; the bytes are then those of the tokens, not of the mark that replaces them."""
    ids = data.draw(
        st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12)
    )
    written, scored = scored_answer(tokenizer, tokenizer.encode("the"), ids)
    joined = b"".join(one.content for one in scored)
    assert MARK.encode() not in joined
    decoded = joined.decode(errors="replace")
    if MARK not in written:
        assert decoded == written
    # Of a run of byte tokens that is not a text, the decoder replaces every byte, those
    # of letters as well: the bytes have more than the text, in the same order.
    rest = iter(without_marks(decoded))
    assert all(letter in rest for letter in without_marks(written))


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("bytes", "é", [("bytes:\\xc3", b"\xc3"), ("bytes:\\xa9", b"\xa9")]),
        (
            "byte-fallback",
            "☃",
            [
                ("bytes:\\xe2", b"\xe2"),
                ("bytes:\\x98", b"\x98"),
                ("bytes:\\x83", b"\x83"),
            ],
        ),
        (
            "sentencepiece",
            "☃",
            [
                ("bytes:\\xe2", b"\xe2"),
                ("bytes:\\x98", b"\x98"),
                ("bytes:\\x83", b"\x83"),
            ],
        ),
        ("sentencepiece", "the", [(" the", b" the")]),
    ],
)
def test_tokens_have_their_own_names(
    tmp_path: Path, kind: str, text: str, wanted: list[tuple[str, bytes]]
) -> None:
    tokenizer = build_tokenizer(kind, tmp_path)
    texts = TokenTexts(tokenizer)
    found = [texts.of(token) for token in tokenizer.encode(text)]
    assert [(one.text, one.content) for one in found][-len(wanted) :] == wanted


def test_control_tokens_have_a_name_and_no_bytes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("sentencepiece", tmp_path)
    assert tokenizer.eos_id is not None
    end = TokenTexts(tokenizer).of(tokenizer.eos_id)
    assert (end.text, end.content) == ("</s>", b"")


def test_a_repeated_prompt_is_text_from_its_first_token_on(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode("the cats sat")
    scores = [
        TokenScore(ids[0]),
        *(TokenScore(token, -1.0, [(token, -1.0)]) for token in ids[1:]),
    ]
    detokenizer = Detokenizer(tokenizer, [], stops=["cat"], score_end=True)
    repeated = detokenizer.push_prompt(scores, with_scores=True)
    assert repeated.text == tokenizer.decode(ids)
    assert [one.logprob for one in repeated.scored] == [None] + [-1.0] * (len(ids) - 1)
    assert b"".join(one.content for one in repeated.scored) == repeated.text.encode()
    delta = detokenizer.push(GeneratedToken(0, ids[0], -2.0, [], "stop"))
    assert (delta.text, [one.logprob for one in delta.scored]) == ("", [-2.0])


def test_a_stop_string_inside_a_token_cuts_its_bytes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("sentencepiece", tmp_path)
    (the,) = tokenizer.encode("the")
    detokenizer = Detokenizer(tokenizer, [the], stops=["he"])
    delta = detokenizer.push(GeneratedToken(0, the, -1.0))
    assert (delta.text, delta.finish) == (" t", "stop")
    assert [one.content for one in delta.scored] == [b" t"]
