"""Text from tokens, against decoding everything at once and looking for stop strings in the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.generate.engine import GeneratedToken, TokenScore
from evomesh.serve.detokenizer import Detokenizer, TextDelta
from tests.support.chat_folders import FOLDERS
from tests.support.serving import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), ""))


def write(
    tokenizer: Tokenizer,
    text: str,
    stops: list[str],
    end: str = "length",
    scored: bool = False,
) -> list[TextDelta]:
    """Pieces of ``text`` told token by token, up to the one that finishes."""
    ids = tokenizer.encode(text)
    writer = Detokenizer(tokenizer, tokenizer.encode("prompt"), stops)
    pieces = []
    for place, token in enumerate(ids):
        finish = end if place == len(ids) - 1 else ""
        pieces.append(
            writer.push(
                GeneratedToken(
                    0,
                    token,
                    -0.5 if scored else None,
                    [(token, -0.5)] if scored else [],
                    finish,
                )
            )
        )
        if pieces[-1].finish:
            break
    return pieces


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet="ab,é中🙂", min_size=1, max_size=30),
    st.lists(st.text(alphabet="ab,é中", min_size=1, max_size=4), max_size=3),
)
def test_pieces_are_the_text_before_the_first_stop(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    pieces = write(tokenizer, text, stops)
    places = [text.find(stop) for stop in stops if stop in text]
    # The stop that is complete first ends the answer; a longer one that begins earlier has not been seen whole by then.
    complete = min(
        (text.find(stop) + len(stop) for stop in stops if stop in text),
        default=len(text),
    )
    seen = text[:complete]
    cut = min((seen.find(stop) for stop in stops if stop in seen), default=len(text))
    assert "".join(piece.text for piece in pieces) == text[:cut]
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert pieces[-1].finish == ("stop" if places else "length")


def test_nothing_is_held_back_without_need(tokenizer: Tokenizer) -> None:
    assert [piece.text for piece in write(tokenizer, "one", [])] == ["o", "n", "e"]
    assert [piece.text for piece in write(tokenizer, "a\nb\n\nc", ["\n\n"])] == [
        "a",
        "",
        "\nb",
        "",
        "",
    ]
    assert [piece.text for piece in write(tokenizer, "é", [])] == ["", "é"]


def test_a_broken_character_at_the_end_is_told(tokenizer: Tokenizer) -> None:
    writer = Detokenizer(tokenizer, [1, 2])
    first = tokenizer.encode("é")[0]
    assert writer.push(GeneratedToken(0, first, finish="length")).text == "\ufffd"


def test_the_mark_that_ends_an_answer_is_no_text(tokenizer: Tokenizer) -> None:
    pieces = write(tokenizer, "abc", [], end="stop", scored=True)
    assert "".join(piece.text for piece in pieces) == "ab"
    assert [one.text for piece in pieces for one in piece.scored] == ["a", "b"]
    assert pieces[-1].tokens == 3


def test_scores_stand_beside_their_text(tokenizer: Tokenizer) -> None:
    pieces = write(tokenizer, "abSTOP", ["STOP"], scored=True)
    scored = [one for piece in pieces for one in piece.scored]
    assert [(one.text, one.offset) for one in scored] == [("a", 0), ("b", 1)]
    whole = [
        one for piece in write(tokenizer, "aé", [], scored=True) for one in piece.scored
    ]
    assert [one.offset for one in whole] == [0, 1, 1]
    assert write(tokenizer, "abSTO", ["STOP"], scored=True)[-1].text == "STO"


def test_tokens_whose_text_depends_on_the_one_before(tmp_path: Path) -> None:
    """Sentencepiece style: a word's first token bears its space, and the first of a text loses it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(
        models.WordLevel({"▁big": 0, "▁cat": 1, "s": 2, "?": 3}, unk_token="?")
    )
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode([0, 1, 2]) == "big cats"
    writer = Detokenizer(tokenizer, [0])
    assert [writer.push(GeneratedToken(0, token)).text for token in (1, 2, 0)] == [
        " cat",
        "s",
        " big",
    ]


@pytest.mark.parametrize("row", ["llama2", "internlm", "qwen3"])
def test_a_text_is_repeated_as_it_was_written(row: str, tmp_path: Path) -> None:
    """Decoding loses the space at its beginning, where a tokenizer puts one in front of texts."""
    tokenizer = load_tokenizer(FOLDERS[row].write(tmp_path))
    text = " the  cat\n\né "
    ids = [*tokenizer.leading, *tokenizer.encode(text)]
    scores = [TokenScore(token, -1.0) for token in ids]
    writer = Detokenizer(tokenizer, [])
    delta = writer.push_prompt(scores, with_scores=True, text=text)
    assert delta.text == text
    offsets = [scored.offset for scored in delta.scored]
    assert offsets == sorted(offsets)
    assert len(offsets) == len(ids)
    # From the second token of the text on, the text at the offset is the token's.
    for scored in delta.scored[len(tokenizer.leading) + 1 :]:
        is_whole = not scored.text.startswith("bytes:")
        assert not is_whole or text.startswith(scored.text, scored.offset)
    # What follows is placed after it.
    word = tokenizer.encode("x")[-1]
    after = writer.push(GeneratedToken(0, word, -1.0, finish="length"))
    assert after.text == "x"
    assert after.scored[-1].offset == len(text)


def test_bytes_that_are_no_character_stay_the_tokens_own(tmp_path: Path) -> None:
    """A decoder writes a mark for each byte of such a run, even for one that is a letter."""
    tokenizer = load_tokenizer(FOLDERS["llama2"].write(tmp_path))
    names = ["<0xB9>", "<0x41>", "<0xC3>", "t", "<0xE6>", "<0x98>", "<0xA5>", "t"]
    ids = [tokenizer.token_id(name) for name in names]
    contents = [b"\xb9", b"A", b"\xc3", b"t", b"\xe6", b"\x98", b"\xa5", b"t"]
    writer = Detokenizer(tokenizer, tokenizer.encode("the"))
    scored = []
    text = ""
    for number, token in enumerate(ids):
        assert token is not None
        finish = "length" if number + 1 == len(ids) else ""
        delta = writer.push(GeneratedToken(0, token, -1.0, finish=finish))
        text += delta.text
        scored += delta.scored
    assert text == "\ufffd\ufffd\ufffdt春t"
    assert [one.content for one in scored] == contents
    places = {one.text: one.offset for one in scored[3:]}
    assert (scored[3].offset, places["bytes:\\xe6"], scored[-1].offset) == (3, 4, 5)
