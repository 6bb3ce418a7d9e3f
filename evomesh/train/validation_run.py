"""Validation of a checkpoint by itself: the same data, model and sums as in the run that trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.resume import restore
from evomesh.checkpoint.start_point import StartPoint
from evomesh.checkpoint.weights_only import choose_weights
from evomesh.config.data import DataConfig
from evomesh.config.loader import LoadedConfig
from evomesh.config.schema import Config
from evomesh.data.build import ValidationSet, build_valid_data
from evomesh.data.config_folders import training_files
from evomesh.errors import UserError
from evomesh.layers.attention_kernel import attention_kernel
from evomesh.parallel.exchange import default_exchange
from evomesh.train.launch import RunContext, launch
from evomesh.train.stages import ModelStages, build_stages
from evomesh.train.validate import figures_of_average, validate
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationResult:
    """The figures of a checkpoint, the same on every rank.

    Attributes:
        source: which weights, in words.
        step: of the checkpoint; None of another system's.
        figures: as in metrics.jsonl, such as ``val/en_loss``.
        rank: of this process.
    """

    source: str
    step: int | None
    figures: dict[str, float]
    rank: int
    world_size: int


def validate_checkpoint(
    loaded: LoadedConfig,
    path: str | None,
    *,
    ema: bool = False,
    launcher: str = "auto",
    port: int = 8888,
    console: Console | None = None,
) -> ValidationResult:
    """Validate the weights at ``path`` on the sets of ``data.valid_folder``, in the layout of the config.

    Args:
        path: checkpoint or model folder; None: the newest of the config's own run.
        ema: validate the moving average of the weights.
        console: where the log is shown.

    Raises:
        UserError: no validation data, no such weights, or weights of another model.
    """
    refuse_missing_folder(loaded)
    config = loaded.config
    with (
        _without_start_lines(),
        launch(config, launcher=launcher, port=port, console=console) as context,
        attention_kernel(config.model, context.device),
    ):
        return _validate(config, path, ema, context)


@contextmanager
def _without_start_lines() -> Iterator[None]:
    """Leave out the lines that say that a run begins: none does."""
    log = logging.getLogger(launch.__module__)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def refuse_missing_folder(loaded: LoadedConfig) -> None:
    """Refuse a config without validation data: figures of synthetic data say nothing about a model.

    Raises:
        UserError: it names no folder.
    """
    if loaded.config.data.valid_folder is None:
        raise UserError(
            "there is nothing to validate on: data.valid_folder is not set",
            where=loaded.path,
            expected="a folder of token files, one set in each folder below it",
            fix="name it: --set data.valid_folder=FOLDER",
            code="EVO-CLI-009",
        )


def _validate(
    config: Config, path: str | None, ema: bool, context: RunContext
) -> ValidationResult:
    """Read data and weights on this rank and validate."""
    with this_process().phase(Place.START):
        sets = _open_sets(config)
        reader = CheckpointReader(context.grid, default_exchange())
        start = choose_weights(config, path, reader, ema=ema)
        logger.info("validating %s", start.reason)
        stages = _filled_stages(config, start, reader, context)
    figures = _figures(stages, sets, context)
    if ema:
        figures = figures_of_average(figures)
    checkpoint = start.checkpoint
    step = None if checkpoint is None else checkpoint.step
    return ValidationResult(
        source=start.reason,
        step=step,
        figures=figures,
        rank=context.rank,
        world_size=context.world_size,
    )


def _filled_stages(
    config: Config, start: StartPoint, reader: CheckpointReader, context: RunContext
) -> ModelStages:
    """Build this rank's part of the model and read its weights."""
    stages = build_stages(config, context.grid, context.mode, context.device)
    parameters = stages.parameters()
    restore(start, reader, parameters, config.model.model_dump())
    return stages


def _figures(
    stages: ModelStages, sets: list[ValidationSet], context: RunContext
) -> dict[str, float]:
    with this_process().phase(Place.VALIDATION):
        figures = validate(stages, sets, context.grid, context.device, announced_from=0)
    if figures:
        return figures
    names = ", ".join(valid.name for valid in sets)
    raise UserError(
        f"no token of the validation sets is a target: {names}",
        where="data.valid_folder",
        expected="documents of two tokens or more",
        code="EVO-DATA-015",
    )


def _open_sets(config: Config) -> list[ValidationSet]:
    """Open the validation sets; training data that is not on this machine is not needed."""
    data = config.data
    if not _has_training_data(data):
        logger.info(
            "data.train_folder (%s) has no token files here: its tokenizer is not compared with the validation data's",
            data.train_folder,
        )
        data = data.model_copy(update={"train_folder": None})
    return build_valid_data(data, config.model.vocab_size)


def _has_training_data(data: DataConfig) -> bool:
    """Return whether there are training files here whose tokenizer can be compared, or none are named."""
    # Streaming data has no token files to compare with.
    if data.type == "streaming" or data.train_folder is None:
        return True
    try:
        training_files(data)
    except UserError:
        return False
    return True
