"""All answers to a list of prompts, as they are made or at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from evomesh.errors import UserError
from evomesh.generate.beam import beam_search
from evomesh.generate.engine import GenerationEngine, check_prompt
from evomesh.generate.options import SamplingParams
from evomesh.models.language_model import LanguageModel


@dataclass(frozen=True)
class StreamedToken:
    """One step of one answer. ``finish`` is "stop" or "length" with its last token, else ""."""

    prompt: int
    answer: int
    token: int
    finish: str = ""


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[StreamedToken]:
    """Yields tokens as they are made; prompts of a batch need not be equally long and do not influence each other.

    Args:
        prompts: token ids of each prompt, none empty.
        sampling: with ``max_new_tokens`` or ``max_length``, and without beams.
        batch_size: answers that are worked on at the same time; None: all.
        numbers: of the prompts, 0, 1, ... when None: answer a of prompt number p draws from the random stream
            (seed, p * num_return_sequences + a).
    Raises:
        UserError: a prompt is empty or holds ids the model does not know.
    """
    count = sampling.num_return_sequences
    engine = GenerationEngine(
        model, slots=batch_size or max(len(prompts) * count, 1), max_tokens=room(prompts, sampling)
    )
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, engine.max_tokens, engine.vocab_size, f"prompt {index}")
    origin = {}
    for index, prompt in enumerate(prompts):
        for answer in range(count):
            key = (sampling.seed, (numbers[index] if numbers else index) * count + answer)
            origin[engine.add(prompt, replace(sampling, num_return_sequences=1), key)] = index, answer
    while engine.active:
        for token in engine.step():
            yield StreamedToken(*origin[token.request], token.id, token.finish)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """[prompt][answer] -> new token ids, the one that ended the answer included. Arguments as of ``stream``.

    With beams, ``batch_size`` prompts at a time are searched, and prompt number p draws from (seed, p).
    """
    if sampling.num_beams > 1:
        return _beams(
            model, prompts, sampling, batch_size or max(len(prompts), 1), numbers or range(len(prompts))
        )
    made: list[list[list[int]]] = [[[] for _ in range(sampling.num_return_sequences)] for _ in prompts]
    for new in stream(model, prompts, sampling, batch_size=batch_size, numbers=numbers):
        made[new.prompt][new.answer].append(new.token)
    return made


def _beams(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    batch_size: int,
    numbers: Sequence[int],
) -> list[list[list[int]]]:
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, room(prompts, sampling), vocab_size, f"prompt {index}")
    answers = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        answers += beam_search(
            model, part, sampling, room(part, sampling), numbers[start : start + batch_size]
        )
    return answers


def room(prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> int:
    """Most tokens that any prompt and its answer may have together."""
    longest = max(map(len, prompts), default=1)
    if sampling.max_new_tokens is None and sampling.max_length is None:
        raise UserError("neither max_new_tokens nor max_length is given", fix="say how long an answer may be")
    return max(sampling.limit(longest, 2**63 - 1), 2)
