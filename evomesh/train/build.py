"""Construction of a training run, in one visible order."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.native.find import Checkpoint, SaveFolder
from evomesh.checkpoint.native.listener import CommitListener
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.optimizer_state import ema_lines, has_stored_ema, without_ema
from evomesh.checkpoint.resume import check_config, decide, restore
from evomesh.checkpoint.start_point import StartPoint
from evomesh.config.data_stages import check_data_stages
from evomesh.config.epochs import packs_left_out, resolve_epochs, steps_per_epoch
from evomesh.config.folders import FolderPlace
from evomesh.config.loader import LoadedConfig
from evomesh.config.schema import CheckpointConfig, Config, RunConfig, SpikeConfig
from evomesh.data.batch import Batch
from evomesh.data.build import (
    BatchStream,
    TrainData,
    ValidationSet,
    build_train_data,
    build_valid_data,
    check_manifest,
)
from evomesh.errors import UserError
from evomesh.optim.gradient_profile import GradientProfile
from evomesh.optim.group_table import (
    check_groups,
    group_table,
    grouped_parameters,
    mup_line,
)
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.collectives import all_gather_objects
from evomesh.parallel.exchange import Exchange, default_exchange
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard
from evomesh.quantities import counted
from evomesh.train.agreement import data_facts, require_agreement
from evomesh.train.early_stop import EarlyStop
from evomesh.train.launch import RunContext
from evomesh.train.questions import ModelQuestions
from evomesh.train.report import RunReporter
from evomesh.train.spike_start import open_spike_watch, refuse_spoiled
from evomesh.train.spikes import SpikeRollback, SpikeWatch
from evomesh.train.stages import ModelStages, build_optimizer, build_stages
from evomesh.train.state import TrainState
from evomesh.train.stored_state import check_stored_state
from evomesh.train.validate import validation_figures

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """All parts of one training run; ``build_run`` makes it, ``Trainer`` drives it.

    Attributes:
        checkpoints: None when nothing is saved.
        resumed_step: step of the checkpoint this process started from, None for a fresh start.
        reason: one line that says what the run starts from.
        stream: the batches; taken by ``take_batch``.
        gradient_profile: measures gradients in the steps of ``grad_profiling``; None when it is off.
        early_stop: what ends the run when its validation does not improve.
        spikes: judges the steps, and keeps what was decided about spikes.
        questions: what the model is asked while it trains; None for nothing.
    """

    config: Config
    grid: Grid
    device: torch.device
    stages: ModelStages
    optimizer: ZeroOptimizer
    scaler: LossScaler
    train_data: TrainData
    stream: BatchStream
    valid_sets: list[ValidationSet]
    state: TrainState
    reporter: RunReporter
    checkpoints: CheckpointWriter | None
    resumed_step: int | None
    reason: str
    gradient_profile: GradientProfile | None = None
    early_stop: EarlyStop = field(default_factory=lambda: EarlyStop(None))
    spikes: SpikeWatch = field(default_factory=lambda: SpikeWatch(SpikeConfig()))
    questions: ModelQuestions | None = None
    _state_before_batch: dict[str, Any] | None = field(default=None, repr=False)
    _batch_was_returned: bool = field(default=False, repr=False)

    @property
    def saved_step(self) -> int | None:
        """The last step that this process has committed or resumed from; None so far."""
        if self.checkpoints is None:
            return None
        # A copy: the thread that saves adds to it.
        steps = [step for step, _ in list(self.checkpoints.committed)]
        return max(steps, default=self.resumed_step)

    @property
    def local_save_folder(self) -> str | None:
        """The save folder, None if nothing is saved or it is remote."""
        saves = self.checkpoints
        if saves is None or saves.storage.remote:
            return None
        return saves.root

    def take_batch(self) -> Batch:
        """Return the next batch of the stream."""
        self._state_before_batch = self.stream.state()
        return next(self.stream)

    def return_batch(self) -> None:
        """Undo the last ``take_batch`` in ``state_dict``, so that a resumed run takes the batch again.

        This process takes no further batch.
        """
        self._batch_was_returned = True

    def tensors(self) -> dict[str, Tensor | LocalShard]:
        """Return every tensor of a checkpoint, by global name."""
        self.optimizer.wait_for_parameters()
        state = self.optimizer.state_shards() if self.config.ckpt.save_optimizer else {}
        return {**self.stages.parameters(), **state}

    def state_dict(self) -> dict[str, Any]:
        """Return everything else of a checkpoint, as JSON."""
        stream = (
            self._state_before_batch
            if self._batch_was_returned
            else self.stream.state()
        )
        return {
            "train": self.state.state(),
            "sampler": self.train_data.merge_states(
                all_gather_objects(stream, self.grid.dp)
            ),
            "data": self.train_data.manifest,
            "optimizer": self.optimizer.state(),
            "scaler": self.scaler.state(),
            "early_stop": self.early_stop.state(),
            "spikes": self.spikes.state(),
        }


def _choose_start(
    config: Config,
    reader: CheckpointReader,
    folder: SaveFolder | None,
    rollback: SpikeRollback | None,
) -> StartPoint:
    """Return what the run starts from, which its config must fit."""

    def check(checkpoint: Checkpoint) -> None:
        check_stored_state(checkpoint)
        refuse_spoiled(checkpoint, rollback)

    branch = config.lr_scheduler.branch
    start = decide(config.ckpt, reader, folder, check, branch)
    check_config(start, config, reader)
    return start


def build_run(
    loaded: LoadedConfig,
    context: RunContext,
    listener: CommitListener | None = None,
    rollback: SpikeRollback | None = None,
) -> TrainingRun:
    """Build all parts of a run and restore what it resumes or starts from.

    Args:
        listener, rollback: who hears of its checkpoints, and from where it goes back to one.

    Raises:
        UserError: data, model or checkpoint cannot be used. Nothing has been written by then.
    """
    config, grid = loaded.config, context.grid

    # 1. Data first, because it is what most often cannot be used.
    train_data, valid_sets = _build_data(config)
    config = _resolve_epochs(config, train_data, context)

    # 2. What the run starts from, before a large model is built.
    reader = CheckpointReader(grid, default_exchange())
    folder = save_folder(config.ckpt)
    start = _choose_start(config, reader, folder, rollback)

    # 3. Model and optimizer, without weights.
    stages = build_stages(config, grid, context.mode, context.device)
    questions = ModelQuestions(config, stages, context, reader.exchange)
    optimizer, groups = _optimizer_and_groups(config, stages, grid)
    scaler = LossScaler(config.grad_scaler, config.model.dtype)

    # 4. Weights and counters: from a checkpoint, from other weights, or initial values.
    stored = _restore_weights(config, start, reader, stages, optimizer, grid)
    state = _restore_counters(start, stored, optimizer, scaler, config.run)

    # 5. Data position.
    stream = _open_stream(train_data, start, stored, grid)

    # 6. What the run writes to.
    reporter = _reporter(loaded, config, context, state, train_data, groups)
    return TrainingRun(
        config=config,
        grid=grid,
        device=context.device,
        stages=stages,
        optimizer=optimizer,
        scaler=scaler,
        train_data=train_data,
        stream=stream,
        valid_sets=valid_sets,
        state=state,
        reporter=reporter,
        checkpoints=_continuing_writer(config.ckpt, folder, reader, listener, start),
        resumed_step=start.resumed_step,
        reason=start.reason,
        gradient_profile=_gradient_profile(config, optimizer),
        early_stop=_early_stop(config, valid_sets, questions, start, stored),
        spikes=open_spike_watch(reporter, scaler.active, start, stored, rollback),
        questions=questions,
    )


def _reporter(
    loaded: LoadedConfig,
    config: Config,
    context: RunContext,
    state: TrainState,
    data: TrainData,
    groups: str,
) -> RunReporter:
    """Return what the run writes to, which knows where the values of its config come from."""
    reporter = RunReporter(config, loaded.text, context, state, data)
    reporter.origins = loaded.origins
    reporter.parameter_groups = groups
    return reporter


def _continuing_writer(
    config: CheckpointConfig,
    folder: SaveFolder | None,
    reader: CheckpointReader,
    listener: CommitListener | None,
    start: StartPoint,
) -> CheckpointWriter | None:
    """Return the writer of the save folder, which knows the checkpoint that the run starts from."""
    writer = build_checkpoint_writer(
        config, folder, reader.grid, reader.exchange, listener
    )
    if writer is not None and start.checkpoint is not None:
        writer.continue_from(start.checkpoint, reader.skipped)
    return writer


def _early_stop(
    config: Config,
    valid_sets: list[ValidationSet],
    questions: ModelQuestions,
    start: StartPoint,
    stored: dict[str, Any],
) -> EarlyStop:
    """Return what ends the run when its validation does not improve, with the counts of what is resumed."""
    figures = validation_figures(valid_sets)
    if config.optimizer.ema.validates:
        for figure in list(figures):
            name, _, measure = figure.rpartition("_")
            figures.append(f"{name}.ema_{measure}")
    early_stop = EarlyStop(config.data.stop_when, figures, questions.figures)
    if start.keeps_counters:
        early_stop.load_state(stored.get("early_stop"))
    return early_stop


def _open_stream(
    train_data: TrainData,
    start: StartPoint,
    stored: dict[str, Any],
    grid: Grid,
) -> BatchStream:
    """Return the batches of this rank from where the run starts or continues."""
    position = None
    if start.wants("sampler"):
        position = stored["sampler"]
    if position is not None:
        # A position means the same documents only in the same data.
        check_manifest(stored["data"], train_data.manifest)
    stream = train_data.stream(grid.dp.rank, grid.dp.size, position)
    stream.check()
    return stream


def _optimizer_and_groups(
    config: Config, stages: ModelStages, grid: Grid
) -> tuple[ZeroOptimizer, str]:
    """Return the optimizer, and the table of its parameter groups."""
    optimizer = build_optimizer(config, stages, grid)
    return optimizer, _parameter_groups(config, optimizer)


def _parameter_groups(config: Config, optimizer: ZeroOptimizer) -> str:
    """Return the table of the parameter groups, "" without any and without muP.

    Raises:
        UserError: a group has no parameter.
    """
    groups = config.adam.groups
    if not groups and not config.model.mup.is_on:
        return ""
    parameters = grouped_parameters(optimizer)
    check_groups(groups, parameters)
    table = group_table(groups, parameters)
    if not config.model.mup.is_on:
        return table
    return f"{table}\n{mup_line(config.model, config.optimizer.type)}"


def _gradient_profile(
    config: Config, optimizer: ZeroOptimizer
) -> GradientProfile | None:
    """Return what measures gradients, None if nothing is to be measured."""
    if not config.grad_profiling.is_on:
        return None
    tied = config.model.tie_word_embeddings
    return GradientProfile(config.grad_profiling, optimizer.slots, optimizer.grid, tied)


def _build_data(config: Config) -> tuple[TrainData, list[ValidationSet]]:
    """Return training and validation data, the former the same on every rank."""
    train_data = build_train_data(config.data, config.model.vocab_size)
    with closing(default_exchange()) as exchange:
        require_agreement(exchange, data_facts(train_data.manifest))
    if config.data.valid_every <= 0:
        return train_data, []
    return train_data, build_valid_data(config.data, config.model.vocab_size)


def _resolve_epochs(
    config: Config, train_data: TrainData, context: RunContext
) -> Config:
    """Return the config with its epochs as steps, and log them; refuse data stages that do not fit."""
    num_packs = train_data.num_packs
    dp_size = context.grid.dp.size
    check_data_stages(config.data, dp_size)
    resolved = resolve_epochs(config, num_packs, dp_size)
    if resolved is not config and context.rank == 0:
        logger.info("%s", _describe_epochs(resolved, num_packs, dp_size))
    return resolved


def _describe_epochs(config: Config, num_packs: int, dp_size: int) -> str:
    per_epoch = steps_per_epoch(config, num_packs, dp_size)
    left_out = packs_left_out(config, num_packs, dp_size)
    remark = ""
    if left_out:
        remark = f" (not in any step: {counted(left_out, 'pack', '')} of each pass, other ones each time)"
    micro_batches = counted(config.data.micro_num, "micro-batch", "")
    ranks = counted(dp_size, "data-parallel rank", "")
    return (
        f"one pass is {counted(num_packs, 'pack', '')} = {counted(per_epoch, 'step', 'g')} of {micro_batches} on "
        f"{ranks}{remark}: total_steps={config.data.total_steps}, "
        f"checkpoint_every={config.ckpt.checkpoint_every:g}"
    )


def _restore_weights(
    config: Config,
    start: StartPoint,
    reader: CheckpointReader,
    stages: ModelStages,
    optimizer: ZeroOptimizer,
    grid: Grid,
) -> dict[str, Any]:
    """Fill weights, master weights and moments; return the rest of what the checkpoint holds."""
    has_ema = optimizer.ema is not None and has_stored_ema(start)
    with optimizer.evaluated_weights():
        if not start.wants("model"):
            stages.initialize(config.run.seed, grid)
        state = optimizer.state_shards()
        if not has_ema:
            state = without_ema(state)
        tensors = stages.parameters() | state
        stored = restore(start, reader, tensors, config.model.model_dump())
        if not (start.wants("model") and start.wants("optimizer")):
            optimizer.refresh_masters()
    if not has_ema:
        optimizer.restart_ema()
    for line in ema_lines(start, config.optimizer.ema):
        logger.warning("%s", line)
    return stored


def _restore_counters(
    start: StartPoint,
    stored: dict[str, Any],
    optimizer: ZeroOptimizer,
    scaler: LossScaler,
    run: RunConfig,
) -> TrainState:
    """Return the counters of the run; loads those of optimizer and loss scaler."""
    state = TrainState()
    if start.keeps_counters:
        state.load_state(stored["train"])
    elif start.wants("scheduler"):
        state.step_count = int(stored["train"]["step_count"])
    if start.wants("optimizer"):
        optimizer.load_state(stored["optimizer"])
        scaler.load_state(stored["scaler"])
    if start.is_branch:
        _leave_run_folder(state, run)
    return state


def _leave_run_folder(state: TrainState, config: RunConfig) -> None:
    """Make a branch write its log and metrics elsewhere than the run that it branches from.

    Raises:
        UserError: the config names the folder of that run.
    """
    given = config.run_dir
    theirs = state.run_folder
    if given and theirs and FolderPlace.of(given) == FolderPlace.of(theirs):
        raise UserError(
            "this folder has the log and the metrics of the run that this one branches from",
            where=f"run_dir ({given})",
            expected="another folder, or none: RUN/{JOB_NAME}/{time}",
            fix="set run_dir to a new folder",
            code="EVO-TRAIN-007",
        )
    state.run_folder = ""


def save_folder(config: CheckpointConfig) -> SaveFolder | None:
    """Return the save folder; auto_resume reads it even if saving is off."""
    if config.save_ckpt_folder is None:
        return None
    return SaveFolder.open(config.save_ckpt_folder, config.snapshot_ckpt_folder)


def build_checkpoint_writer(
    config: CheckpointConfig,
    folder: SaveFolder | None,
    grid: Grid,
    exchange: Exchange,
    listener: CommitListener | None = None,
) -> CheckpointWriter | None:
    """Return the writer of the save folder, None if nothing is saved."""
    if folder is None or not config.enable_save_ckpt:
        return None
    return CheckpointWriter(
        folder,
        grid=grid,
        exchange=exchange,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        upload_folder=config.async_upload_tmp_folder if config.async_upload else None,
        listener=listener,
    )
