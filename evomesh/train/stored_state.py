"""Check the state that a checkpoint stores besides its tensors, before a run continues from it.

A record with the right hash may hold anything: one that was made by hand, by another
version, or by an attacker. What is refused here is skipped, and the checkpoint before
it is used; what only fails later would end the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from evomesh.checkpoint.native.fields import array, integer, mapping
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.start_anew import start_anew
from evomesh.config.step_values import BatchSizeRampup
from evomesh.data.packing.sampler import SamplerPosition
from evomesh.data.packing.staged_sampler import (
    CURSOR_FIELDS,
    POSITION_FIELDS,
    STAGE_FIELDS,
)
from evomesh.data.records.rows import RowCursor
from evomesh.train.state import TrainState

# InternEvo's position in the data, as `read_counters` of its checkpoints returns it.
INTERNEVO_POSITION = ("step", "seed", "global_batch", "offset")


def check_stored_state(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose stored state cannot continue a run, so that the one before it is used.

    Raises:
        CheckpointError: a part is missing or of the wrong kind; names it.
    """
    state = checkpoint.state
    parts = (state.get("train"), state.get("optimizer"), state.get("scaler"))
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(
            "it has no counters of a training, as weights that were imported have none: it cannot resume a run",
            where=checkpoint.folder,
            fix=f"start anew from its weights: {start_anew(checkpoint.folder)}",
            code="EVO-CKPT-008",
        )
    try:
        _check_parts(state)
        for name, section in checkpoint.config.items():
            if section is not None:
                mapping(section, f"config.{name}")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"parts of the stored state cannot be used: {reason}",
            where=checkpoint.folder,
            code="EVO-CKPT-008",
        ) from None
    # An imported checkpoint is step 0, whatever its counters.
    step = state["train"]["step"]
    if checkpoint.step not in (step, 0):
        raise CheckpointError(
            f"a checkpoint of step {checkpoint.step} with the counters of step {step}",
            where=checkpoint.folder,
            code="EVO-CKPT-008",
        )


def _check_parts(state: Mapping[str, Any]) -> None:
    """Check counters, loss scale, data and position in the data.

    Raises:
        KeyError, TypeError, ValueError: naming the first value that is missing or odd.
    """
    train = state["train"]
    counters = [field.name for field in fields(TrainState)]
    counters.remove("run_folder")
    _check_integers(train, counters, "train")
    run_folder = train["run_folder"]
    _check_text(run_folder, "train.run_folder")
    _check_optimizer(state["optimizer"])
    _check_scaler(state["scaler"])
    _check_early_stop(state.get("early_stop"))
    _check_spikes(state.get("spikes"))
    _check_manifest(state["data"])
    position = mapping(state["sampler"], "sampler")
    _check_position(position)


def _check_integers(values: Any, names: list[str], where: str) -> None:
    """Check that each of the names has a count."""
    values = mapping(values, where)
    for name in names:
        integer(values[name], f"{where}.{name}")


def _check_text(value: Any, name: str) -> None:
    # Names of files and folders may hold any character, unlike those of tensors.
    if not isinstance(value, str):
        raise TypeError(f"{name} is not text")


def _check_fields(values: Any, kind: type[Any], where: str) -> None:
    """Check that a dataclass of integers can be made of the values."""
    names = [field.name for field in fields(kind)]
    _check_integers(values, names, where)
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"{where} has an unknown key {unknown[0][:60]!r}")


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    counts = ["steps"]
    if "ema_calls" in optimizer:
        counts.append("ema_calls")
    _check_integers(optimizer, counts, "optimizer")
    weight_sum = optimizer.get("weight_sum", 0.0)
    is_number = type(weight_sum) in (int, float) and math.isfinite(weight_sum)
    if not is_number or weight_sum < 0:
        raise ValueError("optimizer.weight_sum is not a number >= 0")


def _check_early_stop(counts: Any) -> None:
    # Checkpoints of earlier versions, and imported ones, have none.
    if counts is None:
        return
    _check_integers(counts, ["since_best"], "early_stop")
    best = counts["best"]
    if best is not None and type(best) not in (int, float):
        raise ValueError("early_stop.best is not a number")


def _check_spikes(spikes: Any) -> None:
    # Checkpoints of earlier versions, and imported ones, have none.
    if spikes is None:
        return
    _check_integers(spikes, ["rollbacks"], "spikes")
    for step in array(spikes["left_out"], "spikes.left_out"):
        integer(step, "spikes.left_out")
    for figures in array(spikes["history"], "spikes.history"):
        numbers = array(figures, "spikes.history")
        are_finite = [
            type(number) in (int, float) and math.isfinite(number) for number in numbers
        ]
        if are_finite != [True, True]:
            raise ValueError("spikes.history is not pairs of finite numbers")


def _check_scaler(scaler: Mapping[str, Any]) -> None:
    # That of an imported checkpoint is empty.
    if not scaler:
        return
    _check_integers(scaler, ["good_steps", "overflows"], "scaler")
    scale = scaler["scale"]
    if type(scale) not in (int, float) or not math.isfinite(scale) or scale <= 0:
        raise ValueError("scaler.scale is not a positive number")


def _check_manifest(manifest: Any) -> None:
    # InternEvo's checkpoints describe no data.
    if manifest is None:
        return
    _check_text(mapping(manifest, "data")["hash"], "data.hash")
    for file in array(manifest["files"], "data.files"):
        _check_text(mapping(file, "data.files")["file"], "data.files.file")


def _check_position(sampler: Mapping[str, Any]) -> None:
    """Check a position of any source of data: token files, a mixture of them, streaming, InternEvo's."""
    # Each source of data stores a position of its kind; a key that only it has tells
    # which.
    if "internevo" in sampler:
        _check_integers(sampler["internevo"], list(INTERNEVO_POSITION), "sampler")
        return
    if "lanes" in sampler:
        _check_integers(sampler, ["step", "num_lanes"], "sampler")
        _check_fields(sampler["cursor"], RowCursor, "sampler.cursor")
        for lane in mapping(sampler["lanes"], "sampler.lanes").values():
            row, used = array(lane, "sampler.lanes")
            integer(row, "sampler.lanes")
            integer(used, "sampler.lanes")
        return
    if "stages" in sampler:
        _check_staged_position(sampler)
        return
    # Token files: a mixture counts the packs taken of each source, a single source has
    # the order of its packs.
    _check_fields(sampler["position"], SamplerPosition, "sampler.position")
    if sampler["rampup"] is not None:
        _check_fields(sampler["rampup"], BatchSizeRampup, "sampler.rampup")
    if "counts" in sampler:
        counts = mapping(sampler["counts"], "sampler.counts")
        _check_integers(counts, list(counts), "sampler.counts")
        return
    _check_integers(sampler, ["num_packs", "seed", "unit"], "sampler")
    _check_text(sampler["order"], "sampler.order")


def _check_staged_position(sampler: Mapping[str, Any]) -> None:
    """Check the position in a run with data stages."""
    position = sampler["position"]
    _check_integers(position, list(POSITION_FIELDS), "sampler.position")
    cursors = mapping(sampler["cursors"], "sampler.cursors")
    for name, cursor in cursors.items():
        _check_integers(cursor, list(CURSOR_FIELDS), f"sampler.cursors.{name}")
    _check_integers(sampler, ["seed", "unit"], "sampler")
    _check_text(sampler["order"], "sampler.order")
    stages = array(sampler["stages"], "sampler.stages")
    for stage in stages:
        fields = mapping(stage, "sampler.stages")
        for key in STAGE_FIELDS:
            fields[key]
    stages_so_far = position["stage"] + 1
    if len(stages) != stages_so_far:
        raise ValueError("sampler.stages are not those up to sampler.position.stage")
