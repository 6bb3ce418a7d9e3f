"""From tokens to text, piece by piece: whole characters only, nothing of a stop string, log-probabilities beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from evomesh.data.tokenizer import Tokenizer
from evomesh.generate.engine import GeneratedToken

CONTEXT = 6  # tokens before the new ones that are decoded with them, since a token's text may depend on the one before
LONGEST_CHARACTER = 8  # tokens; what is not a character by then never will be one


@dataclass(frozen=True)
class ScoredToken:
    """One token of an answer with its log-probability. ``offset``: characters of the answer before it."""

    text: str
    logprob: float
    top: list[tuple[str, float]]
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """What one token added to an answer, held-back text of earlier ones included.

    Attributes:
        tokens: made so far.
        finish: "stop", "length", or "" while it goes on.
    """

    text: str
    tokens: int
    scored: list[ScoredToken] = field(default_factory=list)
    finish: str = ""


class Detokenizer:
    """The text of one answer.

    Args:
        prompt: ids the answer goes on from.
        stops: the answer ends before the first of these texts.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids = list(prompt[-CONTEXT:])
        self._start, self._read = (
            0,
            len(self._ids),
        )  # decoded together: [start, ...]; told already: [start, read)
        self._held = ""  # may be the beginning of a stop string
        self._told = 0  # characters given out
        self._made = 0
        self._scored: list[ScoredToken] = []

    def push(self, token: GeneratedToken) -> TextDelta:
        """Takes the next token. After a piece with ``finish``, no more may come."""
        self._made += 1
        ends = token.finish == "stop"  # its token is a mark, not text
        before = self._told + len(self._held)
        if token.logprob is not None and not ends:
            names = [(self._tokenizer.decode([other]), logprob) for other, logprob in token.top]
            self._scored.append(ScoredToken(self._tokenizer.decode([token.id]), token.logprob, names, before))
        if not ends:
            self._ids.append(token.id)
        self._held += self._decode(last=bool(token.finish))
        places = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, _ = min(places)
            return self._give(self._held[:place], "stop", cut=True)
        keep = 0 if token.finish else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._give(self._held[: len(self._held) - keep], token.finish)

    def _decode(self, last: bool) -> str:
        """New whole characters; at the end whatever is left."""
        known = self._tokenizer.decode(self._ids[self._start : self._read])
        text = self._tokenizer.decode(self._ids[self._start :])
        partial = text.endswith("\ufffd") and len(self._ids) - self._read < LONGEST_CHARACTER
        if len(text) <= len(known) or (partial and not last):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _give(self, text: str, finish: str, cut: bool = False) -> TextDelta:
        self._held = self._held[len(text) :]
        self._told += len(text)
        known = [one for one in self._scored if one.offset < self._told or (finish and not cut)]
        self._scored = self._scored[len(known) :]
        return TextDelta(text, self._made, known, finish)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
