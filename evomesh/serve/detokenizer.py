"""From tokens to text deltas: whole characters only, no part of a stop string, log-probabilities with their text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from evomesh.data.tokenizer import Tokenizer
from evomesh.generate.engine import GeneratedToken, TokenScore
from evomesh.serve.token_text import TokenTexts

CONTEXT_TOKENS = 6  # decoded together with the new ones, since a token's text may depend on the one before
# Tokens; bytes that are not a character by then never will be one.
LONGEST_CHARACTER = 8
MARK = "\ufffd"  # stands for bytes that are no character


@dataclass(frozen=True)
class TopToken:
    """One of the most probable tokens at a position, as in ``ScoredToken``."""

    text: str
    content: bytes
    logprob: float


@dataclass(frozen=True)
class ScoredToken:
    """One token of an answer with its log-probability.

    Attributes:
        text: as in ``TokenText``.
        content: the bytes that it contributed; those of all tokens, joined, are the UTF-8 of the text.
        logprob: None for the first token of a prompt, which nothing predicts.
        offset: characters of the answer before it.
    """

    text: str
    content: bytes
    logprob: float | None
    top: list[TopToken]
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """The text that one token added to an answer, with text of earlier ones that was held back.

    Attributes:
        tokens: number of tokens generated so far.
        finish: "stop", "length", or "" while the answer continues.
    """

    text: str
    tokens: int
    scored: list[ScoredToken] = field(default_factory=list)
    finish: str = ""


class Detokenizer:
    """Turns the tokens of one answer into text.

    Args:
        prompt: ids that the answer continues.
        stops: the answer ends before the first of these texts.
        texts: None: those of the tokenizer, worked out again.
        score_end: report the log-probability of the id that ends an answer as well, which has no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        *,
        texts: TokenTexts | None = None,
        score_end: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = texts or TokenTexts(tokenizer)
        self._stops = [stop for stop in stops if stop]
        self._score_end = score_end
        # ids[start:read] are text already, and are decoded again with the new
        # ids[read:].
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._start = 0
        self._read = len(self._ids)
        self._held_back = ""  # text that may be the beginning of a stop string
        self._emitted_characters = 0
        self._tokens = 0
        self._scored: list[ScoredToken] = []  # of text that is not emitted yet
        # How many of them, at the end, are of tokens that are not text yet.
        self._unread_scores = 0

    def push_prompt(
        self,
        scores: Sequence[TokenScore],
        *,
        with_scores: bool,
        text: str | None = None,
        is_all: bool = False,
    ) -> TextDelta:
        """Take the prompt itself, for an answer that repeats it, and return its text; stop strings do not apply.

        Args:
            text: what the client wrote, which is repeated as it is: decoding might change its spaces. None: the client
                sent ids.
            is_all: nothing follows.
        """
        if text is not None:
            return self._repeat_text(scores, text, with_scores, is_all)
        last = len(scores) - 1
        for number, score in enumerate(scores):
            self._append(score, with_scores)
            self._held_back += self._decode_new(flush=is_all and number == last)
        if is_all:
            return self._emit(self._held_back, "length", self._take_scored())
        return self._emit(
            self._held_back, "", self._take_scored(before=len(self._held_back))
        )

    def _repeat_text(
        self, scores: Sequence[TokenScore], text: str, with_scores: bool, is_all: bool
    ) -> TextDelta:
        """Take the tokens of a text, and return it as it is."""
        ids = [score.id for score in scores]
        self._ids = ids[-CONTEXT_TOKENS:]
        self._read = len(self._ids)
        if with_scores:
            self._add_scores_of(text, scores)
        self._held_back = text
        finish = "length" if is_all else ""
        scores_of_text = self._take_scored()
        return self._emit(text, finish, scores_of_text)

    def _add_scores_of(self, text: str, scores: Sequence[TokenScore]) -> None:
        """Add the score of each token at the place where it begins in ``text``."""
        offsets = self._offsets_in(text, len(scores))
        for score, offset in zip(scores, offsets, strict=True):
            scored = self._score(score)
            moved = replace(scored, offset=offset)
            self._scored.append(moved)

    def _offsets_in(self, text: str, count: int) -> list[int]:
        """Return where each of the ``count`` tokens of a text begins."""
        encoded = self._tokenizer.encode_with_spans(text)
        starts = [start for start, _ in encoded.spans]
        # A bos that the tokenizer puts in front is no text.
        silent = count - len(starts)
        return [0] * silent + starts

    def push(self, token: GeneratedToken) -> TextDelta:
        """Take the next token and return the text that is now complete; after a ``finish``, push no more."""
        self._tokens += 1
        self._take(token)

        # The first complete stop string ends the answer.
        held_back = self._held_back
        end = _first_stop(held_back, self._stops)
        if end is not None:
            text = held_back[:end]
            scored = self._scored_before_stop(text)
            return self._emit(text, "stop", scored)

        # At the end everything goes out; before that, all but a possible beginning of a
        # stop string: of "a b\n" with the stop string "\n\n", the line break stays
        # back.
        if token.finish:
            scored = self._take_scored()
            return self._emit(held_back, token.finish, scored)
        overlaps = [_overlap(held_back, stop) for stop in self._stops]
        longest_overlap = max(overlaps, default=0)
        complete = len(held_back) - longest_overlap
        text = held_back[:complete]
        scored = self._take_scored(before=complete)
        return self._emit(text, "", scored)

    def _take(self, token: GeneratedToken) -> None:
        """Add a generated token's text to what is held back, and its score to those of that text."""
        score = TokenScore(token.id, token.logprob, token.top)
        has_score = token.logprob is not None
        is_mark = token.finish == "stop"  # the id that ends an answer is no text
        if not is_mark:
            self._append(score, with_score=has_score)
        is_last = bool(token.finish)
        self._held_back += self._decode_new(flush=is_last)
        # The mark comes after all text, which the flush has just completed.
        scores_mark = is_mark and self._score_end
        if scores_mark and has_score:
            scored_mark = self._score(score)
            scored_mark = replace(scored_mark, content=b"")
            self._scored.append(scored_mark)

    def _append(self, score: TokenScore, with_score: bool) -> None:
        """Add a token to those that are not text yet."""
        self._ids.append(score.id)
        if with_score:
            self._scored.append(self._score(score))
            self._unread_scores += 1

    def _score(self, score: TokenScore) -> ScoredToken:
        own = self._texts.of(score.id)
        top: list[TopToken] = []
        for other_id, logprob in score.top:
            other = self._texts.of(other_id)
            top.append(TopToken(other.text, other.content, logprob))
        # The token begins after all text so far, whether it was emitted or is still
        # held back.
        offset = self._emitted_characters + len(self._held_back)
        return ScoredToken(
            own.text,
            own.content,
            score.logprob,
            top,
            offset,
        )

    def _decode_new(self, flush: bool) -> str:
        """Return the text of the new tokens, if it consists of whole characters or must be flushed; else ""."""
        # Tokenizers decode a text, not a token: a space or a character may need the
        # tokens before it. So the new text is the difference of two texts with the same
        # beginning.
        known_ids = self._ids[self._start : self._read]
        all_ids = self._ids[self._start :]
        known = self._tokenizer.decode(known_ids)
        text = self._tokenizer.decode(all_ids)
        if len(text) <= len(known):
            return ""
        new_tokens = len(self._ids) - self._read
        incomplete = text.endswith(MARK) and new_tokens < LONGEST_CHARACTER
        if incomplete and not flush:
            return ""
        self._start = self._read
        self._read = len(self._ids)
        new_text = text[len(known) :]
        count = self._unread_scores
        self._match_contents(new_text)
        self._place_whole_tokens(count, new_text)
        return new_text

    def _match_contents(self, text: str) -> None:
        """Make the contents of the tokens of a new text add up to it, where the context changed their text."""
        count = self._unread_scores
        self._unread_scores = 0
        if not count:
            return
        group = self._scored[-count:]
        joined = b"".join(scored.content for scored in group)
        # Bytes that are not a character stay as they are. Decoders differ in how many
        # marks they write for them.
        decoded = joined.decode(errors="replace")
        if _collapse_marks(decoded) == _collapse_marks(text):
            return
        # Of a run of byte tokens that are not text, sentencepiece's decoder writes a mark
        # for each byte, for those that are ASCII as well.
        rest = text.lstrip(MARK)
        marks = len(text) - len(rest)
        bytes_before = len(joined) - len(rest.encode())
        if joined.endswith(rest.encode()) and bytes_before <= marks:
            return
        # The first word of a text loses the space that its token has inside one. After
        # any other change only the sum is known: it goes to the last token.
        contents = [scored.content for scored in group]
        if joined.removeprefix(b" ") == text.encode():
            contents[0] = contents[0].removeprefix(b" ")
        else:
            # Parts of characters before it keep their bytes, which became the marks.
            before = contents[:-1]
            num_bytes = sum(map(len, before))
            if not 0 < num_bytes <= marks:
                before = [b""] * len(before)
                rest = text
            contents = [*before, rest.encode()]
        self._scored[-count:] = map(_with_content, group, contents)

    def _place_whole_tokens(self, count: int, text: str) -> None:
        """Set where the last tokens begin that are whole texts; those before them may be parts of characters.

        Of bytes that are no character and "at", which become "\ufffdat", the last begins
        after the mark.
        """
        end = len(text)
        for position in range(1, count):
            scored = self._scored[-position]
            own_text = scored.content.decode(errors="replace")
            is_whole = bool(own_text) and text.endswith(own_text, 0, end)
            if not is_whole:
                return
            end -= len(own_text)
            # All tokens of a group were taken at the place where its text begins.
            offset = scored.offset + end
            moved = replace(scored, offset=offset)
            self._scored[-position] = moved

    def _take_scored(self, before: int | None = None) -> list[ScoredToken]:
        """Remove and return the scored tokens that begin in the next ``before`` characters; None: all."""
        taken = self._scored
        if before is not None:
            end = self._emitted_characters + before
            taken = [scored for scored in self._scored if scored.offset < end]
        self._scored = self._scored[len(taken) :]
        return taken

    def _scored_before_stop(self, text: str) -> list[ScoredToken]:
        """Remove and return the scored tokens of the last text; a stop string may begin inside the last of them."""
        taken = self._take_scored(before=len(text))
        if not taken:
            return []
        *whole, last = taken
        start = last.offset - self._emitted_characters
        own_text = text[start:]
        own_bytes = len(own_text.encode())
        shortened = replace(last, content=last.content[:own_bytes])
        return [*whole, shortened]

    def _emit(self, text: str, finish: str, scored: list[ScoredToken]) -> TextDelta:
        self._held_back = self._held_back[len(text) :]
        self._emitted_characters += len(text)
        return TextDelta(text, self._tokens, scored, finish)


def _with_content(scored: ScoredToken, content: bytes) -> ScoredToken:
    return replace(scored, content=content)


def _collapse_marks(text: str) -> str:
    return re.sub(f"{MARK}+", MARK, text)


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first complete stop string begins; None: there is none."""
    starts = [text.find(stop) for stop in stops if stop in text]
    return min(starts, default=None)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
