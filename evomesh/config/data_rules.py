"""Rules of the data section that involve several keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from evomesh.config.data import DataConfig
from evomesh.config.data_stages import (
    DataStageConfig,
    data_stage_problem,
    resolve_data_stages,
)
from evomesh.config.finding import ConfigFinding, nearest
from evomesh.config.schema import Config
from evomesh.config.step_values import RAMPUP_FORM, BatchSizeRampup

INT32 = 2**31 - 1


def data_findings(config: Config) -> Iterator[ConfigFinding]:
    """Yield what is wrong with the data section."""
    data = config.data
    # The bounds of a pack's segments, cu_seqlens, are int32: the flash kernels take no
    # other.
    if data.packed_length > INT32:
        yield ConfigFinding(
            ("data.seq_len", "data.micro_bsz"),
            f"seq_len * micro_bsz = {data.packed_length} tokens in one pack",
            expected=f"at most 2**31 - 1 = {INT32}",
            code="EVO-CONFIG-002",
        )
    # InternEvo asserts this without a pipeline, and ignores the key with one.
    is_other = data.gradient_accumulation not in (None, data.micro_num)
    if is_other and config.parallel.pipeline.size == 1:
        yield ConfigFinding(
            ("data.gradient_accumulation", "data.micro_num"),
            f"gradient_accumulation={data.gradient_accumulation} but micro_num={data.micro_num}",
            expected="the same number: both are the micro-batches of one step",
            fix="remove data.gradient_accumulation",
            code="EVO-CONFIG-007",
        )
    if data.epochs is not None and data.rampup_batch_size is not None:
        yield ConfigFinding(
            ("data.epochs", "data.rampup_batch_size"),
            "with a growing batch the steps of a pass are not all of one size",
            fix="set data.total_steps instead of data.epochs",
            code="EVO-CONFIG-007",
        )
    if data.order == "xtuner" and not data.use_packed_dataset:
        yield ConfigFinding(
            ("data.use_packed_dataset", "data.order"),
            "rows of one document with XTuner's order, which packs documents",
            expected='use_packed_dataset=True, or order="internevo"',
            fix="remove data.use_packed_dataset",
            code="EVO-CONFIG-007",
        )
    if data.type == "streaming":
        yield from _streaming_findings(data)
    else:
        yield from _weight_findings("data.dataset_weights", data.dataset_weights)
    if data.rampup_batch_size is not None:
        yield from _rampup_findings(data.rampup_batch_size, data.micro_num)
    if data.stages:
        yield from _stages_findings(config)
    yield from _in_run_findings(data)


def _weight_findings(
    key: str, weights: Mapping[str, float] | None, place: str = ""
) -> Iterator[ConfigFinding]:
    """Yield each weight that no share of the data can have."""
    for name, weight in (weights or {}).items():
        if not 0 < weight < math.inf:
            yield ConfigFinding(
                (key,),
                f"{place}{name!r} has weight {weight:g}",
                expected="a positive number",
                fix="remove the name from the weights: its files are then not trained on",
                code="EVO-DATA-022",
            )


def _streaming_findings(data: DataConfig) -> Iterator[ConfigFinding]:
    """Text is tokenized during training, so what that takes must be named before."""
    needed = {
        "data.train_folder": (data.train_folder, "a folder with text"),
        "data.tokenizer_path": (data.tokenizer_path, "a tokenizer"),
    }
    for key, (value, expected) in needed.items():
        if value is None:
            yield ConfigFinding(
                (key,),
                f'data.type="streaming" needs {key}',
                expected=expected,
                code="EVO-CONFIG-003",
            )
    if data.rampup_batch_size is not None:
        yield ConfigFinding(
            ("data.rampup_batch_size", "data.type"),
            'data.type="streaming" needs a fixed number of packs per step',
            fix="remove rampup_batch_size, or tokenize the text first",
            code="EVO-CONFIG-007",
        )


def _in_run_findings(data: DataConfig) -> Iterator[ConfigFinding]:
    """Yield what is wrong with what the model is asked during training."""
    asked: dict[str, tuple[str, int, tuple[str, ...] | None]] = {
        "data.samples.prompts": (
            "data.sample_every",
            data.sample_every,
            None if data.samples is None else data.samples.prompts,
        ),
        "data.evaluation.tasks": (
            "data.eval_every",
            data.eval_every,
            None if data.evaluation is None else data.evaluation.tasks,
        ),
    }
    for key, (every_key, every, texts) in asked.items():
        if every <= 0:
            continue  # switched off
        if texts is None:
            yield ConfigFinding(
                (every_key, key),
                f"{every_key}={every}, but {key} is not set",
                expected=f'{key}=["..."]',
                code="EVO-CONFIG-007",
            )
            continue
        if not texts or not all(texts):
            yield ConfigFinding(
                (key,),
                f"found {list(texts)}",
                expected="at least one text, none of them empty",
                code="EVO-CONFIG-002",
            )
        if data.tokenizer_path is None:
            yield ConfigFinding(
                ("data.tokenizer_path", key),
                f"{key} is text, and no tokenizer is named",
                expected="the tokenizer that the data was tokenized with",
                code="EVO-CONFIG-007",
            )


def _stages_findings(config: Config) -> Iterator[ConfigFinding]:
    """Yield what is wrong with data stages; what depends on the number of ranks is checked when a run starts."""
    data = config.data
    others = {
        "data.rampup_batch_size": (data.rampup_batch_size, "set micro_num in stages"),
        "data.epochs": (data.epochs, "set data.total_steps"),
        "ckpt.checkpoint_every_epochs": (
            config.ckpt.checkpoint_every_epochs,
            "set ckpt.checkpoint_every",
        ),
    }
    for key, (value, fix) in others.items():
        if value is not None:
            yield ConfigFinding(
                ("data.stages", key),
                f"data.stages together with {key}",
                fix=f"{fix} instead of {key}",
                code="EVO-CONFIG-012",
            )
    if data.type == "streaming":
        yield ConfigFinding(
            ("data.stages", "data.type"),
            'data.stages with data.type="streaming"',
            fix="tokenize the text first: evomesh tokenize",
            code="EVO-CONFIG-012",
        )
    yield from _stage_ends(data)
    for number, item in enumerate(data.stages, 1):
        place = f"data stage {number}: "
        yield from _weight_findings("data.stages", item.dataset_weights, place)
        section = item.section(data)
        if section.seq_len > data.seq_len or section.packed_length > data.packed_length:
            yield ConfigFinding(
                ("data.stages",),
                f"data stage {number} has seq_len {section.seq_len} and packs of {section.packed_length} tokens",
                expected=f"at most data.seq_len={data.seq_len} and seq_len * micro_bsz={data.packed_length}: "
                "the data section has the largest, which memory and positions are planned for",
                code="EVO-CONFIG-012",
            )


def _stage_ends(data: DataConfig) -> Iterator[ConfigFinding]:
    """Yield ends that are wrong in every layout: those by step."""
    last_step = 0
    last_tokens = 0
    for number, item in enumerate(data.stages, 1):
        found = _wrong_end(item, last_step, last_tokens)
        if found:
            yield ConfigFinding(
                ("data.stages",),
                f"data stage {number} {found}",
                expected="one end for each data stage, after that of the one before",
                code="EVO-CONFIG-012",
            )
            return
        last_step = item.until or last_step
        last_tokens = item.until_tokens or last_tokens
    if all(item.until_tokens is None for item in data.stages):
        problem = data_stage_problem(resolve_data_stages(data, 1), data.total_steps)
        if problem:
            yield ConfigFinding(
                ("data.stages", "data.total_steps"),
                problem,
                expected="stages that follow each other from step 0 to data.total_steps; the last needs no end",
                code="EVO-CONFIG-012",
            )


def _wrong_end(item: DataStageConfig, last_step: int, last_tokens: int) -> str:
    """Return what is wrong with the end of a data stage after the ends of earlier ones, "" if nothing is."""
    if item.until is not None and item.until_tokens is not None:
        return "has until and until_tokens"
    if item.until is not None and item.until <= last_step:
        return f"ends at step {item.until}, an earlier one at step {last_step}"
    if item.until_tokens is not None and item.until_tokens <= last_tokens:
        return (
            f"ends at {item.until_tokens:,} tokens, an earlier one at {last_tokens:,}"
        )
    return ""


def _rampup_findings(ramp: BatchSizeRampup, micro_num: int) -> Iterator[ConfigFinding]:
    key = ("data.rampup_batch_size", "data.micro_num")
    if ramp.start > micro_num:
        yield ConfigFinding(
            key,
            f"starts at {ramp.start} micro-batches, above micro_num={micro_num}",
            expected=RAMPUP_FORM,
            code="EVO-CONFIG-002",
        )
    elif (micro_num - ramp.start) % ramp.increment:
        yield ConfigFinding(
            key,
            f"from {ramp.start} in steps of {ramp.increment} never reaches micro_num={micro_num}",
            expected=f"an increment of {nearest(ramp.increment, micro_num - ramp.start)}",
            code="EVO-CONFIG-002",
        )
