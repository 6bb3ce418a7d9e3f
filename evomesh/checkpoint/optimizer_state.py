"""The check that the optimizer state of a checkpoint belongs to the run's update rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evomesh.checkpoint.native.ema_weights import EMA
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.start_point import StartPoint
from evomesh.config.optimizer import EmaConfig, OptimizerConfig
from evomesh.config.start_anew import start_anew
from evomesh.parallel.spec import LocalShard

# Checkpoints of before the key, and all foreign ones.
FIRST_TYPE = "adamw"
NO_MOMENTS = ("model", "scheduler", "sampler")


def refuse_other_optimizer(start: StartPoint, config: OptimizerConfig) -> None:
    """Refuse to continue the optimizer state of one update rule with another: their tensors mean other things.

    Raises:
        CheckpointError: with both rules, and how to start the state anew.
    """
    if not start.wants("optimizer"):
        return
    checkpoint = start.checkpoint
    stored = FIRST_TYPE
    folder = start.path
    if checkpoint is not None:
        stored = stored_type(checkpoint.config)
        folder = checkpoint.folder
    if stored == config.type:
        return
    raise CheckpointError(
        f"optimizer.type is {stored!r} in the checkpoint and {config.type!r} in the config",
        where=folder,
        expected="the update rule that the optimizer state is of",
        fix=f"set optimizer.type to {stored!r}, or start a new optimizer state from its weights, schedule and data "
        f"position: {start_anew(folder, NO_MOMENTS)}",
        code="EVO-CKPT-010",
    )


def stored_type(config: Mapping[str, Any]) -> str:
    """Return ``optimizer.type`` of the run that wrote a checkpoint, from the config in its record."""
    section = config.get("optimizer") or {}
    return str(section.get("type", FIRST_TYPE))


def has_stored_ema(start: StartPoint) -> bool:
    """Return whether the averages of the weights are read from where a run starts."""
    if start.checkpoint is None or not start.wants("optimizer"):
        return False
    return any(name.startswith(EMA) for name in start.checkpoint.index().names())


def without_ema(state: Mapping[str, LocalShard]) -> dict[str, LocalShard]:
    """Return the optimizer's tensors but for the averages of the weights."""
    return {name: shard for name, shard in state.items() if not name.startswith(EMA)}


def ema_lines(start: StartPoint, config: EmaConfig) -> Iterator[str]:
    """Yield a line where the average of the weights does not continue what is stored."""
    stored = has_stored_ema(start)
    if stored and config.decay is None:
        yield "the checkpoint has an average of the weights, which ends here: optimizer.ema is off"
    if config.decay is not None and start.wants("model") and not stored:
        yield "the average of the weights (optimizer.ema) begins with the loaded weights"
