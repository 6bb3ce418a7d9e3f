"""Load a checkpoint of XTuner into a run: its weights, and the step at which it stopped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from evomesh.checkpoint.deepspeed.weights import XTunerWeights
from evomesh.checkpoint.huggingface.load import ForeignTensor, foreign_tensors
from evomesh.checkpoint.huggingface.match import refuse_another_head
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import ModelConfig

# In the config's text that mmengine stores: micro-iterations of one optimizer step.
ACCUMULATION = re.compile(r"\baccumulative_counts\s*=\s*(\d{1,9})\b")


def load_xtuner(
    path: str, model: dict[str, Any]
) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield the tensors of XTuner's checkpoint under our names.

    Args:
        path: an ``iter_N.pth``, or a folder whose newest one is meant.
        model: the model section of the run.
    Raises:
        CheckpointError: no such checkpoint, not complete, or of another model.
    """
    config = ModelConfig.model_validate(model, strict=False)
    yield from native_tensors(XTunerWeights(path), config)


def native_tensors(
    weights: XTunerWeights, config: ModelConfig
) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield (our name, tensor) for all tensors of the model.

    Raises:
        CheckpointError: the weights are those of another model.
    """
    if config.tie_word_embeddings:
        refuse_another_head(weights, weights.naming)
    yield from foreign_tensors(weights, weights.naming, config)


def load_xtuner_state(path: str) -> dict[str, Any]:
    """Return {"train": ..., "sampler": ...}: the counters of a run that continues, and its place in the data.

    Raises:
        CheckpointError: the checkpoint does not tell its step.
    """
    weights = XTunerWeights(path)
    step, skipped = _steps(weights.record, weights.path)
    train = {
        "step": step,
        "step_count": step - skipped,
        "num_consumed_tokens": 0,  # which XTuner does not count
        "inf_nan_skip_batches": skipped,
        "consecutive_skips": 0,
        "run_folder": "",
    }
    return {"train": train, "sampler": {"xtuner": {"step": step}}, "data": None}


def _steps(record: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return the optimizer steps taken, and how many of them were skipped.

    DeepSpeed counts both. mmengine counts micro-iterations; those after the last whole
    step are lost, as its gradient is.
    """
    # 1. DeepSpeed's own counts.
    steps = record.get("global_steps")
    skipped = record.get("skipped_steps", 0)
    if _is_count(steps) and _is_count(skipped) and skipped <= steps:
        return steps, skipped

    # 2. mmengine's: iterations, divided by how many of them make a step, which only the
    #    text of the config tells.
    meta = record.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    iterations = meta.get("iter")
    stated = ACCUMULATION.findall(str(meta.get("cfg", "")))
    counts = {int(number) for number in stated}
    if not _is_count(iterations) or len(counts) != 1 or counts == {0}:
        raise CheckpointError(
            f"does not tell its step: meta.iter is {iterations!r}, accumulative_counts in meta.cfg {sorted(counts)}",
            where=where,
            expected="a number of micro-iterations, and how many of them are a step",
            fix='start from its weights: load_ckpt_info content=("model",), in an XTuner config load_from=PATH with '
            "resume=False",
            code="EVO-CKPT-020",
        )
    return iterations // counts.pop(), 0


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63
