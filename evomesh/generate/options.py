"""Sampling parameters of a request: how its tokens are chosen and when it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.config.schema import GenerationConfig

# Float32 holds the quotient of any logit and this, or a larger one.
LOWEST_TEMPERATURE = 1e-30
PagedMode = Literal["auto", "on", "off"]  # whether keys and values are kept in pages


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request: how its tokens are chosen, and when it ends.

    The meanings are those of ``transformers.generate``; the parameters apply in the
    order below.

    Attributes:
        repetition_penalty: logits of tokens in the prompt or the completion are divided by it (negative ones
            multiplied), greedy or not; 1 is no penalty. (Keskar et al., 1909.05858)
        temperature: logits are divided by it; below ``LOWEST_TEMPERATURE``, as 0, is greedy.
        do_sample: sample; False is greedy.
        top_k: sample from the k most probable tokens only; 0 is all.
        top_p: nucleus sampling: the smallest set of most probable tokens whose probability reaches p.
            (Holtzman et al., 1904.09751)
        min_p: drop tokens below this fraction of the top token's probability. (Nguyen et al., 2407.01082)
        num_beams: sequences of a beam search; 1 is no beam search.
        length_penalty: a finished beam's summed log-probability is divided by (new tokens)^length_penalty.
        num_return_sequences: completions per prompt; greedy gives one, a beam search at most ``num_beams``.
        seed: sampling seed.
        max_new_tokens: maximum length of a completion; takes precedence over ``max_length``.
        max_length: maximum length of prompt and completion together. If neither is given, the context length.
        eos_ids: the completion ends with the first of these ids.
        logprobs: how many of the most probable tokens to report with each token; 0: only the token's own
            log-probability; -1: none.
        score_prompt: also report the log-probabilities of the prompt's tokens.
    Raises:
        UserError: a value is out of range.
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
    score_prompt: bool = False

    @classmethod
    def from_config(cls, section: GenerationConfig) -> SamplingParams:
        """Return the parameters of a config's ``generation`` section."""
        return cls.from_settings(
            section, eos_ids=(*section.eos_id, *section.additional_eos_token_list)
        )

    @classmethod
    def from_settings(cls, settings: object, **given: Any) -> SamplingParams:
        """Return the parameters of anything that has some of them as attributes of the same names.

        Args:
            settings: a config section, an API request, the controls of the page, ...
            given: parameters that ``settings`` lacks, or means differently.
        """
        taken = {
            field.name: getattr(settings, field.name)
            for field in fields(cls)
            if hasattr(settings, field.name)
        }
        return cls(**taken | given)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(
                    f"{field.name} is {value}",
                    where=field.name,
                    expected="a finite number",
                    code="EVO-GEN-001",
                )
        for name, holds, expected in self._rules():
            if not holds:
                raise UserError(
                    f"{name} is {getattr(self, name)}",
                    where=name,
                    expected=expected,
                    code="EVO-GEN-001",
                )

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Yield (parameter, whether its value is allowed, what would be) in the order in which they are checked."""
        max_new_tokens = self.max_new_tokens
        max_length = self.max_length
        yield "repetition_penalty", self.repetition_penalty > 0, "above 0"
        yield "temperature", self.temperature >= 0, "0 (greedy) or more"
        yield "top_k", self.top_k >= 0, "0 (all) or more"
        yield "top_p", 0 < self.top_p <= 1, "above 0, at most 1"
        yield "min_p", 0 <= self.min_p <= 1, "from 0 to 1"
        yield "num_beams", self.num_beams >= 1, "at least 1"
        yield "num_return_sequences", self.num_return_sequences >= 1, "at least 1"
        # How many answers there can be depends on how they are found.
        if self.num_beams > 1:
            expected = f"at most {self.num_beams}: one for each beam"
            yield (
                "num_return_sequences",
                self.num_return_sequences <= self.num_beams,
                expected,
            )
        elif self.greedy:
            expected = "at most 1: greedy completions are all the same"
            yield "num_return_sequences", self.num_return_sequences == 1, expected
        yield "seed", 0 <= self.seed < 2**64, "from 0 to 2**64 - 1"
        yield (
            "max_new_tokens",
            max_new_tokens is None or max_new_tokens >= 1,
            "at least 1",
        )
        yield "max_length", max_length is None or max_length >= 1, "at least 1"
        yield "logprobs", self.logprobs >= -1, "-1 (none) or more"

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < LOWEST_TEMPERATURE

    def max_total_length(self, prompt_length: int, context_length: int) -> int:
        """Return how long prompt and completion may get together: at most ``context_length``.

        A prompt that fills ``max_length`` still gets one token.
        """
        if self.max_new_tokens is not None:
            wanted = prompt_length + self.max_new_tokens
        elif self.max_length is not None:
            wanted = self.max_length
        else:
            wanted = context_length
        return min(max(wanted, prompt_length + 1), context_length)
