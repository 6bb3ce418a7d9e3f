"""Training from a loaded config, to a finished run and its exit code."""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import replace
from os import PathLike

from evomesh.checkpoint.huggingface.background_exports import (
    BackgroundExports,
    running_exports,
)
from evomesh.checkpoint.huggingface.export import refuse_unexportable_run
from evomesh.checkpoint.resume import restart_line
from evomesh.config.loader import LoadedConfig, load_config
from evomesh.config.warning_lines import warning_lines
from evomesh.data.config_folders import other_tokenizer
from evomesh.layers.attention_kernel import attention_kernel
from evomesh.train.alerts import TrainingAlerts
from evomesh.train.allocator import keep_freed_memory
from evomesh.train.build import TrainingRun, build_run
from evomesh.train.job import reporting_early_errors
from evomesh.train.launch import RunContext, launch
from evomesh.train.launchers import detect, spawn_ranks
from evomesh.train.memory import float16_warning, product_ratio, refuse_too_large
from evomesh.train.signals import StopRequest
from evomesh.train.spikes import SpikeRollback
from evomesh.train.trainer import Trainer
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place

logger = logging.getLogger(__name__)


def run_training(
    config: LoadedConfig | str | PathLike[str],
    *,
    launcher: str = "auto",
    port: int = 8888,
    profile: bool = False,
    memory_profile: bool = False,
    until: int | None = None,
    blames: bool = False,
) -> int:
    """Train to ``data.total_steps``, resuming from a checkpoint if there is one.

    Where training needs several processes and this is a single one, torchrun replaces
    it and runs the same command line on every rank.

    Args:
        config: a loaded config, or the path of a config file.
        launcher: where rank information comes from: "auto", "torch" or "slurm".
        port: rendezvous port of the slurm launcher.
        profile, memory_profile, until, blames: see ``Trainer``.

    Returns:
        0 when the run is complete, 130 after Ctrl-C, 75 when a signal stopped it and the same command resumes it.

    Raises:
        UserError: anything in the config, the data or the checkpoints that cannot be used.
    """
    with reporting_early_errors(launcher, port):
        loaded = config if isinstance(config, LoadedConfig) else load_config(config)
        spawn_ranks(launcher)
        rank = detect(os.environ, launcher, port).rank
        with (
            TrainingAlerts(loaded.config, rank) as alerts,
            running_exports(loaded.config.ckpt) as exports,
        ):
            with (
                launch(
                    loaded.config,
                    launcher=launcher,
                    port=port,
                    before_end=alerts.ended_by_peer,
                    before_hang_ends=alerts.ended_by_hang,
                ) as context,
                attention_kernel(loaded.config.model, context.device),
            ):
                exit_code = _train(
                    loaded,
                    context,
                    exports,
                    alerts,
                    profile=profile,
                    memory_profile=memory_profile,
                    until=until,
                    blames=blames,
                )
            # Only now: the other ranks have left, and none of them waits for rank 0.
            if exports is not None:
                _finish(exports, exit_code)
    return exit_code


def _finish(exports: BackgroundExports, exit_code: int) -> None:
    """Wait for what the run still exports, as long as no signal is in a hurry."""
    request = StopRequest.installed() or StopRequest()
    exports.finish(
        is_complete=exit_code == 0, should_stop=lambda: request.signal is not None
    )


def _train(
    loaded: LoadedConfig,
    context: RunContext,
    exports: BackgroundExports | None,
    alerts: TrainingAlerts,
    *,
    profile: bool,
    memory_profile: bool,
    until: int | None = None,
    blames: bool = False,
) -> int:
    """Build the run on this rank and train it, again after each rollback; return the exit code."""
    # 1. What can be known before the model is built: warnings, and whether it fits at
    #    all.
    warnings = warning_lines(loaded.warnings, loaded.path)
    if context.device.type == "cpu":
        refuse_too_large(loaded.config, context.world_size)
        keep_freed_memory()
        slow = float16_warning(loaded.config, product_ratio)
        warnings += [slow] if slow else []
    if context.rank == 0:
        # Looks at every token file's record: not on every rank.
        warnings += other_tokenizer(loaded.config.data)
        for warning in warnings:
            logger.warning("%s", warning)

    # 2. The run, from its newest checkpoint, and from an earlier one after a spike.
    if exports is not None:
        refuse_unexportable_run(loaded.config)
    rollback: SpikeRollback | None = None
    while True:
        exit_code, rollback = _train_once(
            loaded,
            context,
            exports,
            alerts,
            rollback,
            profile=profile,
            memory_profile=memory_profile,
            until=until,
            blames=blames,
        )
        if rollback is None:
            return exit_code
        loaded = _with_own_checkpoints(loaded, rollback)
        gc.collect()  # model and optimizer of the start that ended


def _with_own_checkpoints(
    loaded: LoadedConfig, rollback: SpikeRollback
) -> LoadedConfig:
    """Return the config of the start after a rollback, which resumes what this run has saved, if anything."""
    if not rollback.saved:
        return loaded
    ckpt = loaded.config.ckpt.model_copy(update={"auto_resume": True})
    return replace(loaded, config=loaded.config.model_copy(update={"ckpt": ckpt}))


def _train_once(
    loaded: LoadedConfig,
    context: RunContext,
    exports: BackgroundExports | None,
    alerts: TrainingAlerts,
    rollback: SpikeRollback | None,
    *,
    profile: bool,
    memory_profile: bool,
    until: int | None,
    blames: bool,
) -> tuple[int, SpikeRollback | None]:
    """Train from where the run starts or went back to; return the exit code, and whether it goes back again."""
    # Whatever takes long from here on is watched, and crashes are alerts.
    with this_process().phase(Place.START):
        run = build_run(loaded, context, exports, rollback)
        _claim_folders(run)
    alerts.attach(
        run.reporter.folder,
        run.reporter.main,
        context.started,
        saves_to=run.local_save_folder,
    )
    try:
        # Steps, until the last one or a reason to stop.
        trainer = Trainer(
            run,
            exports,
            alerts,
            profile=profile,
            memory_profile=memory_profile,
            until=until,
            blames=blames,
        )
        exit_code = trainer.train()
        return exit_code, trainer.rollback
    except Exception:
        if run.checkpoints is not None and context.rank == 0:
            logger.error("%s", restart_line(run.checkpoints.folder))
        raise


def _claim_folders(run: TrainingRun) -> None:
    """Become the one writer of the save folder, and so of the run folder that its checkpoints name.

    Only then may alerts be recorded in the run folder: a second start would report its
    refusal there as a crash of the job that lives.
    """
    has_steps_left = run.state.step < run.config.data.total_steps
    if run.checkpoints is not None and has_steps_left:
        run.checkpoints.claim()
