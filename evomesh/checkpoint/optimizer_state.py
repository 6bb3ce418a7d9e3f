"""The check that the optimizer state of a checkpoint belongs to the run's update rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.start_point import StartPoint
from evomesh.config.schema import OptimizerConfig

# Checkpoints of before the key, and all foreign ones.
FIRST_TYPE = "adamw"


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
        f'position, in another save_ckpt_folder: auto_resume=False, load_ckpt_info=dict(path="{folder}", '
        'content=("model", "scheduler", "sampler"))',
    )


def stored_type(config: Mapping[str, Any]) -> str:
    """Return ``optimizer.type`` of the run that wrote a checkpoint, from the config in its record."""
    section = config.get("optimizer") or {}
    return str(section.get("type", FIRST_TYPE))
