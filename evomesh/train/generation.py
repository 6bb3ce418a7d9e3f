"""Answers to a folder of tokenised prompts: the ``generation`` section of a config, on one process or many."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from evomesh.checkpoint.detect import kind_of
from evomesh.checkpoint.native.manager import CheckpointManager
from evomesh.checkpoint.resume import StartPoint, decide, restore
from evomesh.config.loader import LoadedConfig
from evomesh.config.schema import (
    CheckpointConfig,
    Config,
    GenerationConfig,
    LoadConfig,
    ParallelConfig,
    PipelineConfig,
    TensorConfig,
)
from evomesh.data.prompts import TokenizedPrompt, find_tasks, read_prompts
from evomesh.data.token_files.writer import BinWriter
from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.errors import UserError
from evomesh.generate.decode import generate
from evomesh.generate.options import SamplingParams
from evomesh.generate.staged import StagedModel
from evomesh.models.language_model import LanguageModel
from evomesh.parallel.collectives import all_gather_objects
from evomesh.parallel.grid import Axis
from evomesh.storage.atomic_file import write_atomically
from evomesh.storage.urls import open_storage
from evomesh.train.launch import RunContext, launch, spawn_ranks
from evomesh.train.stages import build_stages

logger = logging.getLogger(__name__)

BATCH = 8  # answers worked on at the same time, where the config does not say
SAME = (  # settings that change what given weights compute, and that no shape shows
    *(
        "model_type",
        "num_attention_heads",
        "layer_norm_epsilon",
        "norm_type",
        "apply_post_layer_norm",
        "use_swiglu",
    ),
    *("qk_interleaved", "rope_base", "norm_head"),
)


@dataclass(frozen=True)
class PromptResult:
    """A prompt with its answers, none when it was skipped."""

    prompt: TokenizedPrompt
    answers: list[list[int]]


def generate_from_config(loaded: LoadedConfig, launcher: str = "auto", port: int = 8888) -> None:
    """Answers every prompt of ``generation.data_folder`` (else ``data.valid_folder``) and writes the results.

    Raises:
        UserError: the section, the prompts or the checkpoint cannot be used.
    """
    spawn_ranks(launcher)
    settings = loaded.config.generation
    if settings is None:
        raise UserError(
            "the config has no generation section", where="generation", fix="add generation = dict(...)"
        )
    sampling = sampling_of(settings)
    folder, key = prompt_folder(loaded.config)
    output = output_folder(settings, folder)
    vocab_size = loaded.config.model.vocab_size
    # All of them before the first is answered, so that a broken file ends the run while nothing is done.
    tasks = {
        name: read_prompts(files, vocab_size) for name, files in find_tasks(folder, key, vocab_size).items()
    }
    path = loaded.config.data.tokenizer_path
    text = load_tokenizer(path, "data.tokenizer_path") if path else None
    config = inference_layout(loaded.config)
    with launch(config, launcher, port=port) as place:
        if place.rank == 0:
            for warning in (*loaded.warnings, larger_share(loaded.config.parallel, config.parallel)):
                if warning:
                    logger.warning("%s", warning)
        model = load_model(config, place)
        first = 0
        for name, prompts in tasks.items():
            if warning := ended(name, prompts, sampling):
                logger.warning("%s", warning)
            started = time.perf_counter()
            answered = answer(model, prompts, settings, sampling, place.grid.dp, first)
            first += len(prompts)
            if place.rank == 0:
                write(output, name, answered, sampling, text)
                logger.info("%s", summary(name, answered, time.perf_counter() - started))


def sampling_of(settings: GenerationConfig) -> SamplingParams:
    """The section's keys as a request; ``max_length`` counts the prompt, ``max_new_tokens`` goes before it."""
    return SamplingParams(
        repetition_penalty=settings.repetition_penalty,
        temperature=settings.temperature,
        do_sample=settings.do_sample,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        num_return_sequences=settings.num_return_sequences,
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        max_length=settings.max_length,
        eos_ids=(*settings.eos_id, *settings.additional_eos_token_list),
    )


def prompt_folder(config: Config) -> tuple[str, str]:
    """The folder of the prompts, and the key that named it."""
    assert config.generation is not None
    for folder, key in (
        (config.generation.data_folder, "generation.data_folder"),
        (config.data.valid_folder, "data.valid_folder"),
    ):
        if folder is not None:
            return folder, key
    raise UserError(
        "no prompts: neither generation.data_folder nor data.valid_folder is set",
        where="generation.data_folder",
        expected="a folder of token files, such as evomesh tokenize writes",
    )


def output_folder(settings: GenerationConfig, prompts: str) -> Path:
    if settings.output_folder is None:
        raise UserError("no place for the results", where="generation.output_folder", expected="a folder")
    output = Path(settings.output_folder.removeprefix("local:")).expanduser()
    if output.resolve().is_relative_to(Path(prompts).expanduser().resolve()):
        raise UserError(
            f"{output} lies in the folder of the prompts: results would be read as prompts the next time",
            where="generation.output_folder",
            fix="choose another folder",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {output}: {error.strerror or error}", where="generation.output_folder"
        ) from None
    return output


def inference_layout(config: Config) -> Config:
    """The config with the layout that decoding uses: tensor mode mtp, contiguous stages, the rest data parallel.

    msp and fsp cut weights as mtp does, and what they save of activations is nothing for one token a sequence. isp's
    weight axis becomes the tensor axis, as far as heads and widths divide, so that no rank gathers whole blocks.
    """
    parallel, model = config.parallel, config.model
    size = parallel.tensor.size
    if parallel.tensor.mode == "isp":
        parts = (model.num_attention_heads, model.kv_heads, model.mlp_width)
        axes = (parallel.weight.size, parallel.tensor.size)
        size = max(
            size
            for size in range(1, max(axes) + 1)
            if any(axis % size == 0 for axis in axes) and not any(part % size for part in parts)
        )
    layout = ParallelConfig(
        tensor=TensorConfig(size=size), pipeline=PipelineConfig(size=parallel.pipeline.size)
    )
    model = model.model_copy(update={"num_chunks": 1, "compile": False})
    return config.model_copy(update={"parallel": layout, "model": model})


def larger_share(trained: ParallelConfig, used: ParallelConfig) -> str:
    """A warning where decoding needs more memory for weights on a rank than training did, "" where it does not."""
    before, now = trained.weight.size, used.tensor.size
    if trained.tensor.mode != "isp" or now >= before:
        return ""
    return (
        f"each rank holds 1/{now} of its layers' weights, not 1/{before} as parallel.weight.size={before} says: "
        "heads, key/value heads and the feed-forward width have no larger divisor in common with it "
        "(parallel.pipeline.size shares them further)"
    )


def load_model(config: Config, place: RunContext) -> LanguageModel:
    """This rank's part of the model, filled from the checkpoint that the config names."""
    stages = build_stages(config, place.grid, place.mode, place.device)
    (model,) = stages.models
    fill_model(config, stages.parameters(), place)
    model.eval()
    if place.grid.pp.size == 1:
        return model
    return StagedModel(model, place.grid.pp, config.model)


def fill_model(config: Config, parameters: dict[str, Any], place: RunContext) -> None:
    """Reads ``generation.ckpt_folder``, else the newest of ``ckpt.save_ckpt_folder``: ours, InternEvo's or HF's.

    Raises:
        UserError: neither is set, or there is no checkpoint of this model.
    """
    assert config.generation is not None
    path = config.generation.ckpt_folder or config.ckpt.save_ckpt_folder
    if path is None:
        raise UserError(
            "no weights: neither generation.ckpt_folder nor ckpt.save_ckpt_folder is set",
            where="generation.ckpt_folder",
            expected="a checkpoint folder",
        )
    start = find_weights(path, place)
    logger.info("%s", start.reason)
    manager = CheckpointManager(path, grid=place.grid)
    if start.found is None:
        restore(start, manager, parameters, config.model.model_dump())
        return
    manager.load(start.found, parameters, strict=False, cast=True)
    theirs = start.found.config.get("model", {})
    for key in SAME:
        if key in theirs and theirs[key] != getattr(config.model, key):
            logger.warning(
                "model.%s is %s, the checkpoint was trained with %s",
                key,
                getattr(config.model, key),
                theirs[key],
            )


def find_weights(path: str, place: RunContext) -> StartPoint:
    kind = kind_of(*open_storage(path))
    info = LoadConfig(path=path, ckpt_type=kind if kind in ("hf", "llama") else "internevo")
    chosen = CheckpointConfig(auto_resume=False, load_ckpt_info=info)
    return decide(chosen, CheckpointManager(path, grid=place.grid))


def answer(
    model: LanguageModel,
    prompts: Sequence[TokenizedPrompt],
    settings: GenerationConfig,
    sampling: SamplingParams,
    dp: Axis,
    first: int,
) -> list[PromptResult]:
    """Every prompt of a task in order, on every rank; data-parallel ranks share the work.

    Args:
        first: number of the task's first prompt over all tasks: it keys the random streams, so that neither the
            layout nor the batch size changes an answer.
    """
    wanted = [index for index, prompt in enumerate(prompts) if fits(prompt, sampling)]
    mine = wanted[dp.rank :: dp.size]
    answers = generate(
        model,
        [prompts[index].ids for index in mine],
        sampling,
        batch_size=settings.batch_size or BATCH,
        numbers=[first + index for index in mine],
    )
    results: dict[int, list[list[int]]] = {}
    for part in all_gather_objects(dict(zip(mine, answers, strict=True)), dp):
        results |= part
    return [PromptResult(prompt, results.get(index, [])) for index, prompt in enumerate(prompts)]


def fits(prompt: TokenizedPrompt, sampling: SamplingParams) -> bool:
    """Whether there are tokens to go on from and, with ``max_length``, room for an answer behind them."""
    assert sampling.max_length is not None
    return bool(prompt.ids) and (sampling.max_new_tokens is not None or len(prompt.ids) < sampling.max_length)


def ended(name: str, prompts: Sequence[TokenizedPrompt], sampling: SamplingParams) -> str:
    """A warning where prompts end with what ends an answer, as documents made for training do."""
    count = sum(bool(prompt.ids) and prompt.ids[-1] in sampling.eos_ids for prompt in prompts)
    if not count:
        return ""
    fix = "made for training? tokenise prompts with evomesh tokenize --no-eos"
    return f"{name}: {count} of {len(prompts)} prompts end with an id that ends an answer ({fix})"


def write(
    output: Path,
    name: str,
    answered: Sequence[PromptResult],
    sampling: SamplingParams,
    text: Tokenizer | None,
) -> None:
    """``NAME.bin`` with its meta (prompt and answer as one document each) and ``NAME.jsonl`` (a prompt a line)."""
    documents = [[*one.prompt.ids, *new] for one in answered for new in one.answers]
    if documents:
        with BinWriter(output / f"{name}.bin") as writer:
            writer.write(documents)
            writer.commit({"made_by": "evomesh generate"})
    path = output / f"{name}.jsonl"
    with write_atomically(path) as file:
        file.writelines(orjson.dumps(record(one, sampling, text)) + b"\n" for one in answered)


def record(one: PromptResult, sampling: SamplingParams, text: Tokenizer | None) -> dict[str, Any]:
    """One line of the readable results; texts where there is a tokenizer, without the token that ended the answer."""
    ends = ["stop" if new and new[-1] in sampling.eos_ids else "length" for new in one.answers]
    line: dict[str, Any] = {"file": one.prompt.file, "line": one.prompt.line}
    if not one.answers:
        line["skipped"] = "no tokens" if not one.prompt.ids else f"no room: {len(one.prompt.ids)} tokens"
    if text is not None:
        shown = [new[:-1] if end == "stop" else new for new, end in zip(one.answers, ends, strict=True)]
        line |= {"prompt": text.decode(one.prompt.ids), "answers": [text.decode(new) for new in shown]}
    return line | {"finish": ends, "prompt_ids": one.prompt.ids, "answer_ids": one.answers}


def summary(name: str, answered: Sequence[PromptResult], seconds: float) -> str:
    tokens = sum(len(new) for one in answered for new in one.answers)
    skipped = sum(not one.answers for one in answered)
    left = f", {skipped} skipped (no tokens, or no room within max_length)" if skipped else ""
    return f"{name}: {len(answered)} prompts{left}, {tokens} new tokens, {tokens / max(seconds, 1e-9):.0f} tokens/s"
