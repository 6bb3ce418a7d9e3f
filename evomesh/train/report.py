"""Reports of a run: log lines, ``metrics.jsonl``, TensorBoard and the live progress line."""

from __future__ import annotations

import logging
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from evomesh.checkpoint.native.software import software
from evomesh.config.data_stages import resolve_data_stages, stage_at, stage_table
from evomesh.config.json_codec import encode_json
from evomesh.config.layout import axis_sizes
from evomesh.config.reading.draft import leaves
from evomesh.config.record import config_to_dict
from evomesh.config.redact import REDACTED, redact_text
from evomesh.config.schema import Config
from evomesh.config.user import expand_home
from evomesh.data.batch import Batch
from evomesh.data.build import TrainData
from evomesh.errors import UserError
from evomesh.monitor.history import HISTORY_FILE, HistoryFile
from evomesh.monitor.log import setup_logging
from evomesh.monitor.metrics import (
    MetricsFile,
    StepObjects,
    StepRecord,
    model_tflops,
)
from evomesh.monitor.optional_output import OptionalOutput
from evomesh.monitor.progress import ProgressLine
from evomesh.monitor.run_folder import (
    check_folder,
    rank_name,
    run_folder,
    tensorboard_folder,
)
from evomesh.monitor.status import StatusWriter
from evomesh.monitor.tensorboard import TensorBoardWriter
from evomesh.monitor.trackers.group import TrackerGroup
from evomesh.optim.groups import hidden_lr_scale
from evomesh.storage.atomic_file import write_atomically
from evomesh.train.agreement import source_digest
from evomesh.train.launch import RunContext
from evomesh.train.memory import memory_in_use
from evomesh.train.samples import PromptSample
from evomesh.train.state import TrainState
from evomesh.train.step import StepOutput

logger = logging.getLogger(__name__)
Z_LOSS = "z_loss"  # in the log line, metrics.jsonl and TensorBoard; with loss.z_loss_coeff only


class RunReporter:
    """Context manager that writes logs and metrics into the run folder.

    Only the main rank writes metrics and TensorBoard: the first data-parallel rank of
    the last pipeline stage, which has the loss.

    Args:
        text: the config file's text, for TensorBoard.
        state: its ``run_folder`` is kept when a run resumes, and set when the run is new.

    Attributes:
        origins: where each value of the config comes from, for ``history.jsonl``.
        reason: what the run starts from, as one line; likewise.
        parameter_groups: the table of ``adam.groups``; "" without groups.
    """

    def __init__(
        self,
        config: Config,
        text: str,
        context: RunContext,
        state: TrainState,
        data: TrainData,
    ) -> None:
        grid = context.grid
        self.config = config
        self.text = text
        self.state = state
        self.data = data
        self.world_size = context.world_size
        self.dp_size = grid.dp.size
        self._stages = resolve_data_stages(config.data, self.dp_size)
        self.context = context
        self.origins: Mapping[str, str] = {}
        self.reason = ""
        self.parameter_groups = ""
        self.main = grid.is_main
        self.name = rank_name(grid.dp.rank, grid.tp.rank, grid.pp.rank, self.main)

        # A run that resumes writes where it did before, unless the config names a
        # folder.
        if config.run.run_dir or not state.run_folder:
            folder = run_folder(config.run, context.started)
            state.run_folder = str(folder)
        self.folder = Path(state.run_folder)
        self._check_folders()

        self.status = StatusWriter(
            self.folder,
            context.rank,
            context.local_rank,
            config.data.total_steps,
            context.started.timestamp(),
            partial(memory_in_use, context.device),
        )
        self.history = HistoryFile(self.folder / HISTORY_FILE if self.main else None)
        # A full disk must not end a run: training continues without these files.
        self._open_files = ExitStack()
        self._metrics: MetricsFile | None = None
        self._samples: StepObjects | None = None
        self._board: TensorBoardWriter | None = None
        self._metrics_output = OptionalOutput("metrics.jsonl", tries_again=True)
        self._samples_output = OptionalOutput("samples.jsonl", tries_again=True)
        self._board_output = OptionalOutput("TensorBoard files", tries_again=False)
        self._rows_output = OptionalOutput("grad_norm", tries_again=True)
        self._progress: ProgressLine | None = None
        self._trackers = TrackerGroup(
            config.monitor.trackers,
            lambda text: self._without_addresses(redact_text(text)),
        )

    def _check_folders(self) -> None:
        run = self.config.run
        check_folder(self.folder, "run_dir" if run.run_dir else "run folder")
        if run.enable_tb:
            check_folder(
                tensorboard_folder(run, self.folder, self.name), "tensorboard_folder"
            )
            earlier = run.resume_tb_folder
            if earlier and not expand_home(earlier).is_dir():
                raise UserError(
                    "no such folder",
                    where=f"resume_tb_folder ({earlier})",
                    code="EVO-TRAIN-007",
                )

    def __enter__(self) -> RunReporter:
        console = setup_logging(self.folder, self.name, shows=self.main)
        self.status.begin(self.state.step)
        self._open_files.enter_context(self.status)
        if self.main:
            self._open_main_outputs(console)
        return self

    def _open_main_outputs(self, console: Console | None) -> None:
        """Open what one rank writes for all, and log what the run is made of."""
        step = self.state.step
        data = self.config.data
        open_until_end = self._open_files.enter_context
        metrics = MetricsFile(self.folder / "metrics.jsonl", step)
        self._metrics = open_until_end(metrics)
        if data.sample_every > 0:
            samples = StepObjects(self.folder / "samples.jsonl", step)
            self._samples = open_until_end(samples)
        if self.config.run.enable_tb:
            self._board = self._open_board(step)
        self.history.start(self._facts())
        logger.info("run folder: %s", self.folder)
        self._start_trackers(step)
        table = self.data.table()
        logger.info("training data:\n%s", table)
        if self._stages:
            logger.info("data stages:\n%s", stage_table(self._stages))
        if self.parameter_groups:
            logger.info("parameter groups:\n%s", self.parameter_groups)
        for warning in self.data.warnings:
            logger.warning("%s", warning)
        progress = ProgressLine(data.total_steps, step, console)
        self._progress = open_until_end(progress)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.status.status.step = self.state.step
        self._open_files.__exit__(kind, error, trace)
        # The status has worked out how the run ends.
        self.history.end(self.state.step, self.status.status.phase)

    def _facts(self) -> dict[str, Any]:
        """Return what a report needs to know of this start of the run, without secrets."""
        sizes = axis_sizes(self.config.parallel, self.world_size)
        layout = {"dp": sizes.dp, "tp": sizes.tp, "pp": sizes.pp}
        typed = redact_text(shlex.join(sys.argv))
        command = self._without_addresses(typed)
        code = {"digest": source_digest()}
        config = config_to_dict(self.config)
        return {
            "began": self.context.started.timestamp(),
            "step": self.state.step,
            "reason": redact_text(self.reason),
            "command": command,
            "folder": str(Path.cwd()),
            "host": socket.gethostname(),
            "device": _device_name(self.context.device),
            "world_size": self.world_size,
            "layout": layout,
            "software": software() | code,
            "data": self.data.manifest,
            "data_report": self.data.report,
            "config": encode_json(config),
            "origins": self.origins,
        }

    def _start_trackers(self, step: int) -> None:
        """Start the trackers, or continue what they tracked; they end with the run."""
        config = config_to_dict(self.config)
        self._trackers.start(
            name=self.config.run.job_name,
            folder=self.folder,
            config=dict(leaves(config)),
            step=step,
        )
        if step == 0:
            self._trackers.text("config", self.text)

        def finish() -> None:
            self._trackers.finish(self.status.is_complete)

        self._open_files.callback(finish)

    def _open_board(self, step: int) -> TensorBoardWriter:
        """Open TensorBoard, which a new run starts with its command and its config."""
        run = self.config.run
        folder = tensorboard_folder(run, self.folder, self.name)
        earlier = None
        if run.resume_tb_folder:
            earlier = expand_home(run.resume_tb_folder)
        board = TensorBoardWriter(folder, step, run.tensorboard_queue, earlier)
        attempt = self._board_output.attempt
        self._open_files.callback(attempt, board.close)
        if step > 0:
            return board
        texts = {"cmd": " ".join(sys.argv), "config": self.text}
        for name, text in texts.items():
            shown = self._without_addresses(text)
            attempt(partial(board.text, name, shown))
        return board

    def _without_addresses(self, text: str) -> str:
        """Hide the secrets that the config has as values, which look like any other text."""
        for secret in self.config.monitor.alert.secrets:
            text = text.replace(secret, REDACTED)
        return text

    def step(
        self,
        step: int,
        batch: Batch,
        output: StepOutput,
        *,
        lr: float,
        beta2: float,
        loss_scale: float,
        seconds: float,
    ) -> StepRecord:
        """Log the line of one step and return its record for ``write``."""
        self._announce_stage(step)
        record = self._record(
            step,
            batch,
            output,
            lr=lr,
            beta2=beta2,
            loss_scale=loss_scale,
            seconds=seconds,
        )
        if self.main:
            # Other extras have a line each; z-loss is part of the loss.
            terms = {key: record.extras[key] for key in record.extras if key == Z_LOSS}
            line = replace(record, extras=terms).line()
            if output.left_out:
                logger.warning("the update of step %d is left out (%s)", step, line)
            elif output.update.check == "ok":
                logger.info("%s", line)
            else:
                logger.warning(
                    "step %d skipped: the gradient is %s (%s)",
                    step,
                    output.update.check,
                    line,
                )
        gradients = output.gradients
        if self.main and gradients is not None and gradients.vocab_norms is not None:
            rows = gradients.vocab_norms
            self._rows_output.attempt(lambda: write_rows(self.folder, step, rows))
        if self._progress is not None:
            self._progress.update(step + 1, record.loss, record.tgs * self.world_size)
        return record

    def _announce_stage(self, step: int) -> None:
        """Log the border of two data stages."""
        stage = stage_at(self._stages, step)
        if self.main and stage is not None and 0 < step == stage.first_step:
            logger.info(
                "data stage %d of %d begins with step %d",
                stage.number,
                len(self._stages),
                step,
            )

    def validation_at_start(self, results: dict[str, float]) -> dict[str, float]:
        """Log one line per validation set and return the results as figures of the first step, ``val_start/...``."""
        self._log_validation("before the first step", results)
        return {
            key.replace("val/", "val_start/", 1): value
            for key, value in results.items()
        }

    def validation(self, record: StepRecord, results: dict[str, float]) -> StepRecord:
        """Log one line per validation set and return the record with the results added."""
        self._log_validation(f"step={record.step}", results)
        return replace(record, extras=record.extras | results)

    def _log_validation(self, when: str, results: dict[str, float]) -> None:
        names = dict.fromkeys(
            key.removeprefix("val/").rpartition("_")[0] for key in results
        )
        for name in names:
            values = " ".join(
                f"{key}={results[key]}"
                for key in results
                if key.rpartition("_")[0] == f"val/{name}"
            )
            if self.main:
                logger.info("Validation on %s: %s %s", name, when, values)

    def write(self, record: StepRecord) -> None:
        """Write one object to ``metrics.jsonl`` and its scalars to TensorBoard."""
        metrics = self._metrics
        board = self._board
        if self.main:
            self._trackers.scalars(record.step, record.values())
        if metrics is not None:
            self._metrics_output.attempt(lambda: metrics.write(record))
        if board is not None:
            self._board_output.attempt(
                lambda: board.scalars(record.step, record.values())
            )

    def scores(self, record: StepRecord, scores: dict[str, float]) -> StepRecord:
        """Log one line per benchmark task and return the record with the scores added."""
        if self.main:
            self._log_scores(record.step, scores)
        extras = record.extras | scores
        return replace(record, extras=extras)

    def _log_scores(
        self,
        step: int,
        scores: Mapping[str, float],
    ) -> None:
        """Log the scores of each task on one line."""
        by_task: dict[str, list[str]] = {}
        for key, value in scores.items():
            name = key.removeprefix("eval/")
            task, _, metric = name.rpartition("/")
            figures = by_task.setdefault(task, [])
            figure = f"{metric}={value}"
            figures.append(figure)
        for task, figures in by_task.items():
            line = " ".join(figures)
            text = f"Evaluation on {task}: step={step} {line}"
            logger.info("%s", text)

    def write_samples(
        self, record: StepRecord, samples: Sequence[PromptSample]
    ) -> None:
        """Write answers of the model to the log, ``samples.jsonl``, TensorBoard and the trackers."""
        file = self._samples
        if file is None or not samples:
            return
        shown = []
        for sample in samples:
            logger.info(
                "Sample: step=%d %r -> %r", record.step, sample.prompt, sample.text
            )
            values = {
                "step": record.step,
                "tokens": record.num_consumed_tokens,
                **asdict(sample),
            }
            self._samples_output.attempt(partial(file.append, values))
            shown.append(f"**{sample.prompt}**{sample.text}")
        text = "\n\n---\n\n".join(shown)
        self._trackers.text(f"samples/step-{record.step:08d}", text)
        board = self._board
        if board is not None:
            clean = self._without_addresses(text)
            self._board_output.attempt(
                lambda: board.text("samples", clean, record.step)
            )

    def _record(
        self,
        step: int,
        batch: Batch,
        output: StepOutput,
        *,
        lr: float,
        beta2: float,
        loss_scale: float,
        seconds: float,
    ) -> StepRecord:
        stage = stage_at(self._stages, step)
        data = self.config.data if stage is None else stage.data
        model = self.config.model
        # [M, K - 1]; 0 where the bounds are padded.
        segment_lengths = batch.cu_seqlens.diff(dim=1)
        segments_per_micro_batch = (segment_lengths > 0).sum(1)
        tokens = batch.tokens.numel() * self.dp_size
        return StepRecord(
            tflops=model_tflops(
                seconds=seconds,
                sequences=data.micro_bsz * len(batch.tokens) * self.dp_size,
                seq_len=data.seq_len,
                hidden_size=model.hidden_size,
                attention_width=model.attention_width,
                attention_span=model.mean_attention_span(data.seq_len),
                num_layers=model.num_layers,
                vocab_size=model.vocab_size,
                mlp_ratio=model.mlp_ratio,
                recompute=model.checkpoint > 0,
                world_size=self.world_size,
            ),
            step=step,
            loss=output.loss,
            tgs=tokens / self.world_size / seconds,
            lr=lr,
            loss_scale=loss_scale,
            grad_norm=output.update.grad_norm,
            micro_num=len(batch.tokens),
            num_consumed_tokens=self.state.num_consumed_tokens,
            inf_nan_skip_batches=self.state.inf_nan_skip_batches,
            num_samples_in_batch=int(segments_per_micro_batch.sum()),
            largest_length=int(segment_lengths.max()),
            largest_batch=int(segments_per_micro_batch.max()),
            smallest_batch=int(segments_per_micro_batch.min()),
            adam_beta2=beta2,
            fwd_bwd_time=output.fwd_bwd_time,
            extras=self._extras(output, lr),
        )

    def _extras(self, output: StepOutput, lr: float) -> dict[str, float]:
        """Return the figures of a step that InternEvo's line does not have."""
        extras = output.tally.summary()
        extras.pop("loss", None)  # the record has the objective under this name
        if self.config.loss.z_loss_coeff:
            extras[Z_LOSS] = output.z_loss
        if output.gradients is not None:
            extras |= output.gradients.scalars
        extras |= self._scaled_rates(lr)
        return extras

    def _scaled_rates(self, lr: float) -> dict[str, float]:
        """Return the learning rates that differ from that of the line: of groups, and of muP's hidden matrices."""
        rates: dict[str, float] = {}
        groups = self.config.adam.groups
        for number, group in enumerate(groups, 1):
            name = f"lr/group{number}"
            rates[name] = lr * group.lr_scale
        model = self.config.model
        if model.mup.is_on:
            rule = self.config.optimizer.type
            scale = hidden_lr_scale(rule, model.width_multiplier)
            rates["lr/hidden"] = lr * scale
        return rates


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{device} {torch.cuda.get_device_name(device)}"


def write_rows(folder: Path, step: int, norms: Tensor) -> None:
    """Write the gradient norm of each row of the output head [V], as ``grad_norm/vocab_grad_norm-00000005.npy``.

    A step that a resumed run redoes replaces its file.
    """
    path = folder / "grad_norm" / f"vocab_grad_norm-{step:08d}.npy"
    with write_atomically(path) as file:
        np.save(file, norms.numpy().astype(np.float32))
