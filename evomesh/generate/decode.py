"""Completions of a list of prompts, streamed token by token or returned at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from evomesh.errors import UserError
from evomesh.generate.beam import beam_search
from evomesh.generate.engine import GenerationEngine, check_eos_ids, check_prompt
from evomesh.generate.options import PagedMode, SamplingParams
from evomesh.models.language_model import LanguageModel

UNLIMITED = 2**63 - 1


@dataclass(frozen=True)
class StreamedToken:
    """One token of one answer. ``finish`` is "stop" or "length" for the answer's last token, else ""."""

    prompt: int
    answer: int
    token: int
    finish: str = ""


def stream_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
    paged: PagedMode = "off",
) -> Iterator[StreamedToken]:
    """Yield tokens as they are generated; prompts of a batch may differ in length and do not affect each other.

    Args:
        prompts: token ids of each prompt, none empty.
        sampling: with ``max_new_tokens`` or ``max_length``, and without beams.
        batch_size: answers that are generated at the same time; None: all.
        numbers: numbers of the prompts, 0, 1, ... if None: answer a of prompt number p draws from the random stream
            (seed, p * num_return_sequences + a).
        paged: whether keys and values are kept in pages, as in ``GenerationEngine``.
    Raises:
        UserError: a prompt is empty, or it or ``sampling.eos_ids`` contains ids that the model does not know.
    """
    # 1. An engine with a slot for each answer of a batch.
    answers_per_prompt = sampling.num_return_sequences
    num_answers = len(prompts) * answers_per_prompt
    slots = batch_size or max(num_answers, 1)
    context_length = _context_length(prompts, sampling)
    engine = GenerationEngine(
        model,
        slots=slots,
        context_length=context_length,
        paged=paged,
    )
    vocab_size = engine.vocab_size
    check_eos_ids(sampling, vocab_size)
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, engine.context_length, vocab_size, f"prompt {index}")

    # 2. One request for each answer.
    if numbers is None:
        numbers = range(len(prompts))
    one_answer = replace(sampling, num_return_sequences=1)
    origins: dict[int, tuple[int, int]] = {}  # request -> (prompt, answer)
    for index, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
        first_stream = number * answers_per_prompt
        for answer in range(answers_per_prompt):
            stream = first_stream + answer
            request = engine.add(prompt, one_answer, (sampling.seed, stream))
            origins[request] = (index, answer)

    # 3. Their tokens, as they come.
    while engine.active:
        for token in engine.step():
            index, answer = origins[token.request]
            yield StreamedToken(index, answer, token.id, token.finish)


def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
    paged: PagedMode = "off",
) -> list[list[list[int]]]:
    """Return the new token ids as [prompt][answer], each with the id that ended the answer.

    Arguments are those of ``stream_tokens``. With beams, ``batch_size`` prompts at a
    time are searched, and prompt number p draws from (seed, p); their cache has no pages.
    """
    if sampling.num_beams > 1:
        _refuse_pages(paged)
        batch_size = batch_size or max(len(prompts), 1)
        numbers = numbers or range(len(prompts))
        return _search_in_batches(model, prompts, sampling, batch_size, numbers)
    answers: list[list[list[int]]] = []
    for _ in prompts:
        answers.append([[] for _ in range(sampling.num_return_sequences)])
    tokens = stream_tokens(
        model,
        prompts,
        sampling,
        batch_size=batch_size,
        numbers=numbers,
        paged=paged,
    )
    for new in tokens:
        answers[new.prompt][new.answer].append(new.token)
    return answers


def _refuse_pages(paged: PagedMode) -> None:
    """Refuse to search beams in pages.

    Raises:
        UserError: pages are asked for.
    """
    if paged == "on":
        raise UserError(
            "a beam search does not keep keys and values in pages",
            where="paged",
            expected="auto or off",
            fix="leave it out",
            code="EVO-GEN-005",
        )


def _search_in_batches(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    batch_size: int,
    numbers: Sequence[int],
) -> list[list[list[int]]]:
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    context_length = _context_length(prompts, sampling)
    check_eos_ids(sampling, vocab_size)
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, context_length, vocab_size, f"prompt {index}")
    answers = []
    for start in range(0, len(prompts), batch_size):
        end = start + batch_size
        batch = prompts[start:end]
        batch_context_length = _context_length(batch, sampling)
        answers += beam_search(
            model, batch, sampling, batch_context_length, numbers[start:end]
        )
    return answers


def _context_length(prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> int:
    """Return the length that the longest of these prompts may reach with its answer.

    Raises:
        UserError: the sampling parameters set no maximum.
    """
    if sampling.max_new_tokens is None and sampling.max_length is None:
        raise UserError(
            "neither max_new_tokens nor max_length is given",
            fix="set the maximum length of an answer",
            code="EVO-GEN-001",
        )
    longest_prompt = max(map(len, prompts), default=1)
    return max(sampling.max_total_length(longest_prompt, UNLIMITED), 2)
