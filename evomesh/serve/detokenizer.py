"""From tokens to text deltas: whole characters only, no part of a stop string, log-probabilities with their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from evomesh.data.tokenizer import Tokenizer
from evomesh.generate.engine import GeneratedToken

CONTEXT_TOKENS = 6  # decoded together with the new ones, since a token's text may depend on the one before
LONGEST_CHARACTER = 8  # tokens; bytes that are not a character by then never will be one


@dataclass(frozen=True)
class ScoredToken:
    """One token of an answer with its log-probability. ``offset``: characters of the answer before it."""

    text: str
    logprob: float
    top: list[tuple[str, float]]
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
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        # ids[start:read] are text already, and are decoded again with the new ids[read:].
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._start = 0
        self._read = len(self._ids)
        self._held_back = ""  # text that may be the beginning of a stop string
        self._emitted_characters = 0
        self._tokens = 0
        self._scored: list[ScoredToken] = []  # of text that is not emitted yet

    def push(self, token: GeneratedToken) -> TextDelta:
        """Take the next token and return the text that is now complete; after a ``finish``, push no more."""
        self._tokens += 1
        is_text = token.finish != "stop"  # the id that ends an answer is a mark
        if is_text:
            if token.logprob is not None:
                self._scored.append(self._score(token, token.logprob))
            self._ids.append(token.id)
        self._held_back += self._decode_new(flush=bool(token.finish))

        # The first complete stop string ends the answer.
        positions = [self._held_back.find(stop) for stop in self._stops]
        found = [position for position in positions if position >= 0]
        if found:
            text = self._held_back[: min(found)]
            scored = self._take_scored(before=len(text))
            return self._emit(text, "stop", scored)

        # At the end everything goes out; before that, all but a possible beginning of a stop string.
        if token.finish:
            scored = self._take_scored()
            return self._emit(self._held_back, token.finish, scored)
        overlaps = [_overlap(self._held_back, stop) for stop in self._stops]
        complete = len(self._held_back) - max(overlaps, default=0)
        scored = self._take_scored(before=complete)
        return self._emit(self._held_back[:complete], "", scored)

    def _score(self, token: GeneratedToken, logprob: float) -> ScoredToken:
        decode = self._tokenizer.decode
        top = [(decode([other]), its_logprob) for other, its_logprob in token.top]
        offset = self._emitted_characters + len(self._held_back)
        return ScoredToken(decode([token.id]), logprob, top, offset)

    def _decode_new(self, flush: bool) -> str:
        """Return the text of the new tokens, if it consists of whole characters or must be flushed; else ""."""
        known_ids = self._ids[self._start : self._read]
        all_ids = self._ids[self._start :]
        known = self._tokenizer.decode(known_ids)
        text = self._tokenizer.decode(all_ids)
        if len(text) <= len(known):
            return ""
        new_tokens = len(self._ids) - self._read
        incomplete = text.endswith("\ufffd") and new_tokens < LONGEST_CHARACTER
        if incomplete and not flush:
            return ""
        self._start = self._read
        self._read = len(self._ids)
        return text[len(known) :]

    def _take_scored(self, before: int | None = None) -> list[ScoredToken]:
        """Remove and return the scored tokens that begin in the next ``before`` characters; None: all."""
        taken = self._scored
        if before is not None:
            end = self._emitted_characters + before
            taken = [scored for scored in self._scored if scored.offset < end]
        self._scored = self._scored[len(taken) :]
        return taken

    def _emit(self, text: str, finish: str, scored: list[ScoredToken]) -> TextDelta:
        self._held_back = self._held_back[len(text) :]
        self._emitted_characters += len(text)
        return TextDelta(text, self._tokens, scored, finish)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
