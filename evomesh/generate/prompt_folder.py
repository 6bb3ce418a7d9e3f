"""Answers to folders of tokenized prompts, one task each, and the files that they are written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from evomesh.config.schema import Config, GenerationConfig
from evomesh.config.user import expand_home
from evomesh.data.prompts import TokenizedPrompt
from evomesh.data.token_files.writer import BinWriter
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError
from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import PagedMode, SamplingParams
from evomesh.models.language_model import LanguageModel
from evomesh.parallel.collectives import all_gather_objects
from evomesh.parallel.grid import Axis
from evomesh.quantities import counted
from evomesh.storage.atomic_file import write_atomically

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class PromptResult:
    """A prompt with its answers; none if it was skipped."""

    prompt: TokenizedPrompt
    answers: list[list[int]]


def find_prompt_folder(config: Config) -> tuple[str, str]:
    """Return the folder of the prompts and the config key that names it.

    Raises:
        UserError: neither ``generation.data_folder`` nor ``data.valid_folder`` is set.
    """
    assert config.generation is not None
    if config.generation.data_folder is not None:
        return config.generation.data_folder, "generation.data_folder"
    if config.data.valid_folder is not None:
        return config.data.valid_folder, "data.valid_folder"
    raise UserError(
        "no prompts: neither generation.data_folder nor data.valid_folder is set",
        where="generation.data_folder",
        expected="a folder of token files, as evomesh tokenize writes them",
        code="EVO-GEN-004",
    )


def create_output_folder(section: GenerationConfig, prompt_folder: str) -> Path:
    """Create ``generation.output_folder`` and return it.

    Raises:
        UserError: it is not set, cannot be created, or is inside the folder of the prompts.
    """
    if section.output_folder is None:
        raise UserError(
            "generation.output_folder is not set",
            where="generation.output_folder",
            expected="a folder for the results",
            code="EVO-GEN-004",
        )
    output = expand_home(section.output_folder.removeprefix("local:"))
    if output.resolve().is_relative_to(expand_home(prompt_folder).resolve()):
        raise UserError(
            f"{output} is inside the folder of the prompts: the next run would read results as prompts",
            where="generation.output_folder",
            fix="choose another folder",
            code="EVO-GEN-004",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {output}: {error.strerror or error}",
            where="generation.output_folder",
            code="EVO-GEN-004",
        ) from None
    return output


def answer_prompts(
    model: LanguageModel,
    prompts: Sequence[TokenizedPrompt],
    sampling: SamplingParams,
    *,
    batch_size: int | None,
    dp: Axis,
    first_number: int,
    paged: PagedMode = "off",
) -> list[PromptResult]:
    """Return the results of all prompts of a task in order, on every rank; data-parallel ranks share the work.

    Args:
        batch_size: answers that are generated at the same time; None: 8.
        first_number: number of the task's first prompt among those of all tasks. It keys the random streams, so that
            neither the layout nor the batch size changes an answer.
        paged: whether keys and values are kept in pages.
    """
    answerable = [
        index for index, prompt in enumerate(prompts) if has_room(prompt, sampling)
    ]
    mine = answerable[dp.rank :: dp.size]
    answers = generate_tokens(
        model,
        [prompts[index].ids for index in mine],
        sampling,
        batch_size=batch_size or DEFAULT_BATCH_SIZE,
        numbers=[first_number + index for index in mine],
        paged=paged,
    )
    answers_by_index: dict[int, list[list[int]]] = {}
    my_answers = dict(zip(mine, answers, strict=True))
    for answers_of_rank in all_gather_objects(my_answers, dp):
        answers_by_index |= answers_of_rank
    return [
        PromptResult(prompt, answers_by_index.get(index, []))
        for index, prompt in enumerate(prompts)
    ]


def has_room(prompt: TokenizedPrompt, sampling: SamplingParams) -> bool:
    """Return whether the prompt has tokens and, if only ``max_length`` limits it, leaves room for an answer."""
    assert sampling.max_length is not None
    fits = sampling.max_new_tokens is not None or len(prompt.ids) < sampling.max_length
    return bool(prompt.ids) and fits


def warn_of_end_ids(
    task: str, prompts: Sequence[TokenizedPrompt], sampling: SamplingParams
) -> str:
    """Return a warning if prompts end with an id that ends an answer, as documents made for training do; else ""."""
    count = sum(
        bool(prompt.ids) and prompt.ids[-1] in sampling.eos_ids for prompt in prompts
    )
    if not count:
        return ""
    return (
        f"{task}: {count} of {len(prompts)} prompts end with an id that ends an answer "
        "(tokenized for training? use evomesh tokenize --no-eos for prompts)"
    )


def write_results(
    output: Path,
    task: str,
    results: Sequence[PromptResult],
    sampling: SamplingParams,
    tokenizer: Tokenizer | None,
) -> None:
    """Write ``TASK.bin`` with its meta (each prompt with its answer as a document) and ``TASK.jsonl`` (for reading)."""
    documents = [
        [*result.prompt.ids, *answer] for result in results for answer in result.answers
    ]
    if documents:
        with BinWriter(output / f"{task}.bin") as writer:
            writer.write(documents)
            writer.commit({"made_by": "evomesh generate"})
    path = output / f"{task}.jsonl"
    with write_atomically(path) as file:
        for result in results:
            record = result_record(result, sampling, tokenizer)
            file.write(orjson.dumps(record) + b"\n")


def result_record(
    result: PromptResult,
    sampling: SamplingParams,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Return one line of the readable results; with a tokenizer also as text, without the id that ended the answer."""
    prompt = result.prompt
    record: dict[str, Any] = {"file": prompt.file, "line": prompt.line}
    if not result.answers:
        record["skipped"] = (
            f"no room: {len(prompt.ids)} tokens" if prompt.ids else "no tokens"
        )
    # An answer ends with a stop token, or where the length allowed no more.
    stopped = [
        bool(answer) and answer[-1] in sampling.eos_ids for answer in result.answers
    ]
    if tokenizer is not None:
        record["prompt"] = tokenizer.decode(prompt.ids)
        record["answers"] = []
        for answer, is_stopped in zip(result.answers, stopped, strict=True):
            text_ids = answer[:-1] if is_stopped else answer
            record["answers"].append(tokenizer.decode(text_ids))
    record["finish"] = ["stop" if is_stopped else "length" for is_stopped in stopped]
    record["prompt_ids"] = prompt.ids
    record["answer_ids"] = result.answers
    return record


def summarize_results(
    task: str, results: Sequence[PromptResult], seconds: float
) -> str:
    """Return the log line of a finished task."""
    tokens = sum(len(answer) for result in results for answer in result.answers)
    skipped = sum(not result.answers for result in results)
    note = (
        f", {skipped} skipped (no tokens, or no room within max_length)"
        if skipped
        else ""
    )
    speed = tokens / max(seconds, 1e-9)
    prompts = counted(len(results), "prompt", "")
    new_tokens = counted(tokens, "new token", "")
    return f"{task}: {prompts}{note}, {new_tokens}, {speed:.0f} tokens/s"
