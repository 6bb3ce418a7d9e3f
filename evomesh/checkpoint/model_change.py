"""Compare the settings that weights were trained with to those of the run that loads them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from evomesh.checkpoint.hub_cache import local_folder
from evomesh.checkpoint.internevo.model import read_model_section
from evomesh.checkpoint.native.agreement import run_on_all_ranks
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.start_point import StartPoint
from evomesh.config.record import config_to_dict
from evomesh.config.resume_effects import (
    ConfigDifference,
    ConfigDifferences,
    compare_configs,
    compare_model_sections,
)
from evomesh.config.schema import Config
from evomesh.parallel.exchange import Exchange

logger = logging.getLogger(__name__)


def config_differences(
    start: StartPoint, config: Config, exchange: Exchange
) -> ConfigDifferences:
    """Return how the config that wrote a checkpoint differs; of InternEvo's folders, how its model section does.

    Other formats are compared where they are read, since each names its settings otherwise.
    """
    present = config_to_dict(config)
    if start.checkpoint is not None:
        return compare_configs(start.checkpoint.config, present)
    if start.ckpt_type != "internevo":
        return ConfigDifferences((), ())
    stored = run_on_all_ranks(exchange, lambda: _internevo_section(start.path))
    function = compare_model_sections(stored, present["model"])
    return ConfigDifferences(function, ())


def _internevo_section(path: str) -> dict[str, Any]:
    """Return the settings in ``model_config.pt``; none where the folder has no such file."""
    return read_model_section(str(local_folder(path))) or {}


def refuse_changed_model(
    start: StartPoint,
    differences: Sequence[ConfigDifference],
    allowed: bool,
    logs: bool,
) -> None:
    """Refuse settings under which the loaded weights are another function than the one that was trained.

    Args:
        allowed: ``ckpt.allow_changed_model``, which turns the error into warnings.
        logs: this rank logs for all of them; every rank refuses alike.

    Raises:
        CheckpointError: naming each setting with both values.
    """
    if not differences:
        return
    if allowed:
        for difference in differences if logs else ():
            logger.warning(
                "the weights were trained with another setting: %s", difference
            )
        return
    checkpoint = start.checkpoint
    where = start.path if checkpoint is None else checkpoint.folder
    lines = "".join(f"\n  {difference}" for difference in differences)
    raise CheckpointError(
        f"the weights were trained with other model settings, and would give other outputs with these:{lines}",
        where=where,
        expected="the model settings of the run that wrote the checkpoint",
        fix="restore these values; if the change is intended and alters the shape of no weight: "
        "--set ckpt.allow_changed_model=True",
        code="EVO-CKPT-010",
    )
