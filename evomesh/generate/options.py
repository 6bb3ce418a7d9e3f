"""What a request asks for: how its tokens are chosen and when it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from evomesh.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """The meanings are those of ``transformers.generate``; the order in which they apply is the order below.

    Attributes:
        repetition_penalty: logits of tokens that stand in the prompt or the answer are divided by it (negative ones
            multiplied), greedy or not; 1 is none. (Keskar et al., 1909.05858)
        temperature: logits are divided by it; 0 is greedy.
        do_sample: draw; False is greedy.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens whose probabilities reach p together, the one that crosses p included.
            (Holtzman et al., 1904.09751)
        min_p: only tokens at least this share as likely as the likeliest. (Nguyen et al., 2407.01082)
        num_beams: sequences searched side by side; 1 is no beam search.
        length_penalty: a finished beam's summed log-probability is divided by (new tokens)^length_penalty.
        num_return_sequences: answers a prompt; greedy gives one, a beam search at most ``num_beams``.
        seed: of the random draws.
        max_new_tokens: most tokens of an answer; when given, ``max_length`` is not looked at.
        max_length: most tokens of prompt and answer together. Neither given: as many as there is room for.
        eos_ids: the answer ends with the first of these.
        logprobs: how many of the likeliest tokens to report with each token; 0: the token's own only; -1: none.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    do_sample: bool = True
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int = 0
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_ids: tuple[int, ...] = ()
    logprobs: int = -1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{field.name} is {value}", where=field.name, expected="a finite number")
        for name, good, expected in self._rules():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}", where=name, expected=expected)

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        yield "repetition_penalty", self.repetition_penalty > 0, "above 0"
        yield "temperature", self.temperature >= 0, "0 (greedy) or more"
        yield "top_k", self.top_k >= 0, "0 (all) or more"
        yield "top_p", 0 < self.top_p <= 1, "above 0, at most 1"
        yield "min_p", 0 <= self.min_p <= 1, "from 0 to 1"
        yield "num_beams", self.num_beams >= 1, "at least 1"
        yield "num_return_sequences", self.num_return_sequences >= 1, "at least 1"
        most = self.num_beams if self.num_beams > 1 else 1 if self.greedy else self.num_return_sequences
        what = f"at most {most}: " + (
            "one of each beam" if self.num_beams > 1 else "greedy answers are all the same"
        )
        yield "num_return_sequences", self.num_return_sequences <= most, what
        yield "seed", 0 <= self.seed < 2**64, "from 0 to 2**64 - 1"
        yield "max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"
        yield "max_length", self.max_length is None or self.max_length >= 1, "at least 1"
        yield "logprobs", self.logprobs >= -1, "-1 (none) or more"

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def limit(self, prompt: int, room: int) -> int:
        """Tokens that prompt and answer may reach together, at most ``room``; a full prompt still gets one token."""
        if self.max_new_tokens is not None:
            wanted = prompt + self.max_new_tokens
        else:
            wanted = room if self.max_length is None else self.max_length
        return min(max(wanted, prompt + 1), room)
