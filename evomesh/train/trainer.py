"""The training loop: one visible order of batch, step, record, validation, checkpoint, stop."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from functools import partial

from evomesh.config.record import config_to_dict
from evomesh.data.batch import Batch
from evomesh.errors import EXIT_TRAINING_STOPPED, UserError
from evomesh.monitor.metrics import StepRecord
from evomesh.monitor.profile import StepProfile, region
from evomesh.optim.schedule import beta2, learning_rate
from evomesh.parallel.build import shared_store
from evomesh.parallel.exchange import default_exchange
from evomesh.train.build import TrainingRun
from evomesh.train.signals import StopRequest
from evomesh.train.step import StepInterruptedError, seed_step, train_step
from evomesh.train.stop import StopPoll
from evomesh.train.upkeep import PeriodicUpkeep
from evomesh.train.validate import validate

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a ``Run`` from where its state stands to ``data.total_steps``.

    Args:
        profile: write a trace of a few steps, and a table of where their time goes, into the run folder.
    """

    def __init__(self, run: TrainingRun, profile: bool = False) -> None:
        self.run, self.profile = run, profile
        self.config, self.state = run.config, run.state
        self.skipped_steps = self.config.data.skip_batches
        self.saved_at = run.resumed_step
        data = self.config.data
        self.upkeep = PeriodicUpkeep(data.empty_cache_and_diag_interval, data.diag_outlier_ratio, run.grid.dp)

    def train(self) -> int:
        """Returns the process's exit code; see ``train_from_config``."""
        total = self.config.data.total_steps
        if self.state.step >= total:
            logger.info(
                "nothing left to train: the run has made %d steps, data.total_steps is %d",
                self.state.step,
                total,
            )
            return 0
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            stack.callback(self.run.stream.close)
            if self.run.checkpoints is not None:
                stack.callback(self.run.checkpoints.close)
                self.run.checkpoints.prepare(self.run.tensors(), saves=self._saves_ahead(), blocking=False)
            stack.enter_context(self.run.reporter)
            logger.info("%s", self.run.reason)
            profile = self._profile()
            if profile is not None:
                stack.enter_context(profile)
            poll = self._poll(stop)
            wish = poll.ask(self.state.step)
            while self.state.step < total and not wish.stop:
                self._one_step(poll)
                if profile is not None:
                    profile.step()
                wish = poll.ask(self.state.step)
                if wish.save:
                    self._save()
            self._save(final=True)
            if self.state.step < total and stop.signal is None:
                logger.warning("stopped by the stop file after %d steps", self.state.step)
            if self.state.step < total and stop.signal is not None:
                where = (
                    "start the same command again to go on" if self.run.checkpoints else "nothing is saved"
                )
                logger.warning(
                    "stopped by %s after step %d: %s", stop.signal.name, self.state.step - 1, where
                )
                return stop.exit_code
        return 0

    def _profile(self) -> StepProfile | None:
        """Of the first rank of each pipeline stage, if at all."""
        grid, reporter = self.run.grid, self.run.reporter
        if not self.profile or grid.dp.rank or grid.tp.rank:
            return None
        return StepProfile(reporter.folder / "traces", reporter.name)

    def _poll(self, stop: StopRequest) -> StopPoll:
        saving = self.run.checkpoints
        path = self.config.ckpt.stop_file_path if saving is not None else None
        exchange = saving.exchange if saving is not None else default_exchange()
        return StopPoll(stop, path, exchange, shared_store())

    def _saves_ahead(self) -> int:
        left = self.config.data.total_steps - self.state.step
        return 1 + int(left / self.config.ckpt.checkpoint_every)

    def _one_step(self, poll: StopPoll) -> None:
        run, state, config = self.run, self.state, self.config
        started = time.perf_counter()
        step, state.step = state.step, state.step + 1
        if step in self.skipped_steps:
            run.stream.skip()
            logger.info("step %d skipped, as data.skip_batches asks", step)
            return
        before = run.stream.state()
        try:
            with region("data wait"):
                batch = next(run.stream)
            record = self._update(step, batch, started, poll)
        except StepInterruptedError:
            state.step, run.stream_state = step, before
            logger.info("step %d broken off between two micro-batches; a restart repeats it", step)
            return
        if config.data.valid_every > 0 and state.step % config.data.valid_every == 0:
            record = run.reporter.validation(
                record, validate(run.stages, run.valid_sets, run.grid, run.device)
            )
        run.reporter.write(record)
        self._refuse_endless_skipping(step)
        self.upkeep.after_step(record.fwd_bwd_time)
        if state.step % config.ckpt.checkpoint_every == 0:  # never for an infinite interval
            self._save()
        elif config.ckpt.oss_snapshot_freq > 1 and state.step % config.ckpt.oss_snapshot_freq == 0:
            self._save(snapshot=True)

    def _update(self, step: int, batch: Batch, started: float, poll: StopPoll) -> StepRecord:
        run, state, config = self.run, self.state, self.config
        seed_step(config.run.seed, step, run.grid.dp.rank)
        lr = learning_rate(state.step_count, config.lr_scheduler, config.adam, config.data.total_steps)
        second = beta2(state.step_count, config.beta2_scheduler, config.adam)
        scale = run.scaler.scale
        output = train_step(
            run.stages.schedule,
            run.optimizer,
            run.scaler,
            batch,
            run.grid,
            config.loss,
            run.train_data.types,
            lr,
            second,
            partial(poll.in_step, step),
        )
        state.record_step(batch.tokens.numel() * run.grid.dp.size, applied=output.update.check == "ok")
        seconds = time.perf_counter() - started
        return run.reporter.step(step, batch, output, lr=lr, beta2=second, loss_scale=scale, seconds=seconds)

    def _refuse_endless_skipping(self, step: int) -> None:
        limit = self.config.run.max_consecutive_skips
        if self.state.consecutive_skips >= limit:
            raise UserError(
                f"the gradient was inf or NaN in the last {limit} steps, up to step {step}; none of them was applied",
                expected="a finite gradient now and then",
                fix='try dtype "torch.bfloat16", a lower adam.lr or a longer warm-up; '
                "max_consecutive_skips sets how many to bear",
                exit_code=EXIT_TRAINING_STOPPED,
            )

    def _save(self, *, snapshot: bool = False, final: bool = False) -> None:
        """Saves behind the training; only the last save of a run is waited for."""
        run, state = self.run, self.state
        if run.checkpoints is None:
            return
        if self.saved_at != state.step:
            run.checkpoints.save(
                state.step,
                run.tensors(),
                run.state_dict(),
                config_to_dict(self.config),
                blocking=final,
                snapshot=snapshot,
                final=final,
            )
            self.saved_at = None if snapshot else state.step
        if final:
            run.checkpoints.wait(final=True)
