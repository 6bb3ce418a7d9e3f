"""The training loop: one visible order of batch, step, record, validation, checkpoint, stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from evomesh.checkpoint.huggingface.background_exports import BackgroundExports
from evomesh.config.record import config_to_dict
from evomesh.data.batch import Batch
from evomesh.errors import EXIT_RESTART, EXIT_TRAINING_STOPPED
from evomesh.monitor.alerts.alert import AlertKind
from evomesh.monitor.metrics import StepRecord
from evomesh.monitor.profile import StepProfile, region
from evomesh.optim.schedule import beta2, learning_rate
from evomesh.parallel.build import shared_store
from evomesh.parallel.exchange import default_exchange
from evomesh.quantities import counted
from evomesh.train import refusals
from evomesh.train.alerts import TrainingAlerts
from evomesh.train.build import TrainingRun
from evomesh.train.court import examine_step
from evomesh.train.diagnosis import Diagnosis, DiskProbe
from evomesh.train.memory_profile import MemoryProfile
from evomesh.train.signals import StopRequest
from evomesh.train.spikes import SpikeFinding, SpikeRollback
from evomesh.train.step import StepOutput, seed_step, train_step
from evomesh.train.step_file import StepFile
from evomesh.train.stop import StopPoll
from evomesh.train.upkeep import PeriodicUpkeep, garbage_at_fixed_steps
from evomesh.train.validate import figures_of_average, validate
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a ``TrainingRun`` from its current step to ``data.total_steps``.

    Args:
        exports: what exports the checkpoints of the run, if anything does.
        alerts: of this rank; by default those of the config.
        profile: write a trace of a few steps, and a table of where their time goes, into the run folder.
        memory_profile: write the peak of each step by kind, and what is alive when memory runs out.
        until: end after so many steps of the run, as if they were all, with the schedules of the whole run.
        blames: examine the last step before its update.
    """

    def __init__(
        self,
        run: TrainingRun,
        exports: BackgroundExports | None = None,
        alerts: TrainingAlerts | None = None,
        *,
        profile: bool = False,
        memory_profile: bool = False,
        until: int | None = None,
        blames: bool = False,
    ) -> None:
        self.run = run
        self.alerts = alerts or TrainingAlerts(run.config, rank=0)
        self.exports = exports
        self.profile = profile
        self.memory_profile = memory_profile
        self.config = run.config
        self.state = run.state
        self.saved_step = run.resumed_step
        # Of the validation before the first step, until that step is recorded.
        self.start_figures: dict[str, float] = {}
        total_steps = run.config.data.total_steps
        self.last_step = total_steps if until is None else min(until, total_steps)
        self.examined_step = self.last_step - 1 if blames else None
        data = run.config.data
        self.skipped_steps = data.skip_batches
        # The spike of the present step, until it is dealt with.
        self.spike: SpikeFinding | None = None
        self.step_file = StepFile.of_this_process()
        self.upkeep = PeriodicUpkeep(
            data.empty_cache_and_diag_interval, self._diagnosis()
        )
        if run.checkpoints is not None:
            run.checkpoints.on_refusal = partial(
                self.alerts.raise_alert, "checkpoint failed"
            )

    def train(self) -> int:
        """Train and return the process's exit code; see ``run_training``."""
        total = self.last_step
        if self.state.step >= total:
            logger.info(
                "nothing left to train: the run is at step %d and data.total_steps is %d",
                self.state.step,
                total,
            )
            if self.exports is not None:
                # A run that was killed at its end may not have exported its last checkpoint.
                self.exports.start()
            return 0
        with ExitStack() as stack:
            stop_request = stack.enter_context(StopRequest.installed() or StopRequest())
            stack.callback(self.run.stream.close)
            if self.run.checkpoints is not None:
                stack.callback(self.run.checkpoints.close)
                with self.run.optimizer.evaluated_weights():
                    self.run.checkpoints.prepare(
                        self.run.tensors(),
                        saves=self._remaining_saves(),
                        blocking=False,
                    )
            if self.exports is not None:
                self.exports.start()
            self.run.reporter.reason = self.run.reason
            stack.enter_context(self.run.reporter)
            stack.enter_context(garbage_at_fixed_steps())
            logger.info("%s", self.run.reason)
            self.alerts.began(
                f"{self.run.reason}; run folder {self.run.reporter.folder}",
                resumed=self.run.resumed_step is not None,
                world_size=self.run.reporter.world_size,
            )
            self._run_steps(self._stop_poll(stop_request), stack)
            if self.rollback is not None:
                return EXIT_RESTART  # of this start: the caller begins the next one
            self.run.reporter.status.ends_early = self.run.early_stop.is_due
            # After a stop as well: a signal costs no step that was finished.
            self._save(final=True)
            if self.state.step < total:
                return self._report_stop(stop_request)
        folder = self.run.reporter.folder
        self.alerts.raise_alert("done", f"all {total} steps are done; {folder}")
        return 0

    def _run_steps(self, poll: StopPoll, stack: ExitStack) -> None:
        """Run steps until the last one, or until a signal or the stop file ends the run."""
        profile = self._step_profile()
        if profile is not None:
            stack.enter_context(profile)
        memory = self._memory_profile()
        if memory is not None:
            stack.enter_context(memory)
        decision = poll.before_first_step(self.state.step)
        if not decision.stop:
            self._validate_at_start()
        while self._has_steps_left() and not decision.stop:
            self._one_step(poll)
            if profile is not None:
                profile.step()
            if memory is not None:
                memory.after_step(self.state.step - 1)
            decision = poll.after_step(self.state.step)
            if decision.save:
                self._save()

    def _has_steps_left(self) -> bool:
        """Return whether the run is to take another step."""
        is_complete = self.state.step >= self.last_step
        return not (is_complete or self.run.early_stop.is_due or self._ends_at_spike)

    @property
    def rollback(self) -> SpikeRollback | None:
        """Return what the next start takes along, if this one ended to go back before a spike."""
        spike = self.spike
        if spike is None or spike.action != "rolled back":
            return None
        checkpoints = self.run.checkpoints
        saved = None
        if checkpoints is not None and not self.config.ckpt.auto_resume:
            committed = list(checkpoints.committed)
            saved = [step for step, _ in committed]
        spike_step = spike.verdict.step
        return self.run.spikes.rollback(spike_step, saved)

    @property
    def _ends_at_spike(self) -> bool:
        return self.spike is not None and self.spike.ends_run

    def _report_stop(self, stop_request: StopRequest) -> int:
        """Log why the run ended early and return the exit code."""
        kind: AlertKind = "stopped"
        steps = counted(self.state.step, "step", "")
        if self.spike is not None and self._ends_at_spike:
            step = self.spike.verdict.step
            line = (
                f"stopped before the update of step {step}, a spike (spike.policy); what it was trained on: evomesh "
                f'replay {self.run.reporter.folder} --step {step} --blame; leave it out: data.skip_batches="{step}"'
            )
            exit_code = EXIT_TRAINING_STOPPED
        elif self.run.early_stop.is_due and stop_request.signal is None:
            kind = "done"
            line = f"stopped after {steps}: {self.run.early_stop.reason}"
            exit_code = 0
        elif stop_request.signal is None:
            line = f"stopped by the stop file after {steps}"
            exit_code = 0
        else:
            advice = "nothing was saved"
            if self.run.checkpoints:
                advice = "rerun the same command to resume"
            last_step = self.state.step - 1
            name = stop_request.signal.name
            line = f"stopped by {name} after step {last_step}: {advice}"
            exit_code = stop_request.exit_code
        logger.warning("%s", line)
        self.alerts.raise_alert(kind, line)
        return exit_code

    def _step_profile(self) -> StepProfile | None:
        """Return the profiler on the first rank of each pipeline stage, None on others and when not asked for."""
        grid = self.run.grid
        reporter = self.run.reporter
        if not self.profile or grid.dp.rank or grid.tp.rank:
            return None
        return StepProfile(reporter.folder / "traces", reporter.name)

    def _memory_profile(self) -> MemoryProfile | None:
        """Return what profiles the memory of this rank, None if it is not asked for."""
        if not self.memory_profile:
            return None
        run = self.run
        folder = run.reporter.folder
        name = run.reporter.name
        return MemoryProfile(folder, name, run.stages, run.optimizer, run.device)

    def _diagnosis(self) -> Diagnosis:
        """Return what looks for slow ranks and reports them in the log and as alerts."""
        data = self.config.data
        disk = None if data.train_folder is None else DiskProbe(data.train_folder)

        def report(sentence: str) -> None:
            logger.warning("%s", sentence)
            self.alerts.raise_alert("slow rank", sentence)

        return Diagnosis(
            data.diag_outlier_ratio,
            self.run.grid,
            self.run.device,
            disk=disk,
            report=report,
        )

    def _stop_poll(self, stop_request: StopRequest) -> StopPoll:
        checkpoints = self.run.checkpoints
        path = self.config.ckpt.stop_file_path if checkpoints is not None else None
        exchange = (
            checkpoints.exchange if checkpoints is not None else default_exchange()
        )
        return StopPoll(stop_request, path, exchange, shared_store())

    def _remaining_saves(self) -> int:
        """Return how many checkpoints the rest of the run writes, the last one included."""
        remaining_steps = self.config.data.total_steps - self.state.step
        return 1 + int(remaining_steps / self.config.ckpt.checkpoint_every)

    def _one_step(self, poll: StopPoll) -> None:
        """Take a batch, train on it, record the step, and validate or save where the config asks for it."""
        run = self.run
        state = self.state
        started = time.perf_counter()
        step = state.step
        state.step += 1
        # A skipped step uses up its batch: the later steps get the data that they would
        # have without the skip.
        if step in self.skipped_steps:
            run.stream.skip()
            logger.info("step %d skipped because data.skip_batches lists it", step)
            return
        if step in run.spikes.left_out and step != self.examined_step:
            run.stream.skip()
            level = logging.WARNING if run.reporter.main else logging.DEBUG
            text = f"step {step} is left out because of a spike: see spikes.jsonl"
            logger.log(level, "%s", text)
            self._save_if_due()
            return
        activity = this_process()
        activity.begin_step(step)
        history = run.reporter.history
        history.begin_step()
        if self.step_file is not None:
            self.step_file.write(step, run.reporter.folder)
        with region("data wait"), self._phase(Place.DATA):
            batch = run.take_batch()
        data_wait = time.perf_counter() - started
        status = run.reporter.status
        status.enter("train")
        record = self._update(step, batch, started, poll)
        # Half a step has no place in a checkpoint: it is as if it had not begun.
        if record is None:
            state.step = step
            run.return_batch()
            logger.info(
                "step %d was interrupted between micro-batches; it will be redone on restart",
                step,
            )
            return
        if self._ends_at_spike:
            self._return_spike(step, record)
            return
        record = self._with_validation(record)
        record = self._with_scores(record)
        with self._phase(Place.REPORT):
            run.reporter.write(record)
        status.step_done(record, state.step, data_wait)
        saves = run.checkpoints
        bytes_per_save = 0 if saves is None else saves.bytes_per_save
        self.alerts.after_step(record, bytes_per_save, self.spike)
        self._refuse_endless_skipping(step)
        with self._phase(Place.UPKEEP):
            self.upkeep.after_step(record.fwd_bwd_time)
        self._save_if_due()
        status.note_saves(run.saved_step, saves is not None and saves.saving)
        history.step_done(step, status.status.memory)
        activity.end_step()

    def _return_spike(self, step: int, record: StepRecord) -> None:
        """Record a spike that ends this process, whose step is as if it had not begun."""
        self.state.step = step
        self.run.return_batch()
        with self._phase(Place.REPORT):
            self.run.reporter.write(record)
        self.alerts.after_step(record, spike=self.spike)

    def _validate_at_start(self) -> None:
        """Validate the weights that a new run begins with; the figures stand in the record of its first step."""
        data = self.config.data
        if self.state.step or data.valid_every <= 0 or not data.valid_at_start:
            return
        with self._phase(Place.VALIDATION):
            results = self._validate()
        self.start_figures = self.run.reporter.validation_at_start(results)

    def _with_validation(self, record: StepRecord) -> StepRecord:
        """Return the record of a step with the figures of its validation, if it has one."""
        data = self.config.data
        extras = record.extras | self.start_figures
        self.start_figures = {}
        record = replace(record, extras=extras)
        if data.valid_every <= 0:
            return record
        is_last = self.state.step == data.total_steps and data.valid_at_end
        if self.state.step % data.valid_every and not is_last:
            return record
        with self._phase(Place.VALIDATION):
            results = self._validate()
        self.run.early_stop.after_validation(results)
        return self.run.reporter.validation(record, results)

    def _with_scores(self, record: StepRecord) -> StepRecord:
        """Ask the model what is due, write its answers, and return the record with its scores."""
        run = self.run
        step = self.state.step
        questions = run.questions
        early_stop = run.early_stop
        if questions is None or not questions.are_due(step, early_stop):
            return record
        with self._phase(Place.VALIDATION), run.optimizer.evaluated_weights():
            scores, samples = questions.ask(step, early_stop)
        reporter = run.reporter
        reporter.write_samples(record, samples)
        return reporter.scores(record, scores)

    def _validate(self) -> dict[str, float]:
        """Return the results of the weights, and of their moving average if it is asked for."""
        run = self.run
        args = (run.stages, run.valid_sets, run.grid, run.device)
        with run.optimizer.evaluated_weights():
            results = validate(*args)
        if self.config.optimizer.ema.validates:
            with run.optimizer.averaged_weights():
                averaged = validate(*args)
            results |= figures_of_average(averaged)
        return results

    @contextmanager
    def _phase(self, place: Place) -> Iterator[None]:
        """Tell the watcher of this host, and who reads the status files, what this rank is doing."""
        reporter = self.run.reporter
        reporter.status.enter(place.words)
        with this_process().phase(place), reporter.history.phase(place.words):
            yield

    def _update(
        self, step: int, batch: Batch, started: float, poll: StopPoll
    ) -> StepRecord | None:
        """Run one optimizer step and return its record; None when it was interrupted."""
        run = self.run
        state = self.state
        config = self.config
        # Seeds and mask numbers follow from the step alone, so that a resumed run draws
        # what the uninterrupted one draws.
        seed_step(config.run.seed, step, run.grid.dp.rank)
        if config.model.has_dropout:
            dp = run.grid.dp
            batch = batch.numbered(config.run.seed, step, dp.rank, dp.size)
        # Schedules count the updates that were applied, not the steps: a step whose
        # gradient was not finite does not move them.
        lr = learning_rate(
            state.step_count, config.lr_scheduler, config.adam, config.data.total_steps
        )
        adam_beta2 = beta2(state.step_count, config.beta2_scheduler, config.adam)
        loss_scale = run.scaler.scale
        if step == self.examined_step:
            examine_step(self.run, step, batch, quietly=True)
        is_profiled = config.grad_profiling.is_due(step)
        output = train_step(
            batch,
            schedule=run.stages.schedule,
            optimizer=run.optimizer,
            scaler=run.scaler,
            grid=run.grid,
            loss_config=config.loss,
            data_types=run.train_data.types,
            lr=lr,
            beta2=adam_beta2,
            should_stop=partial(poll.between_micro_batches, step),
            profile=run.gradient_profile if is_profiled else None,
            limits=run.spikes.limits(),
        )
        if output is None:
            return None
        if not output.tally.targets:
            tokens = batch.tokens.numel() * run.grid.dp.size
            raise refusals.no_target(step, tokens)
        self._count_step(step, batch, output)
        seconds = time.perf_counter() - started
        return run.reporter.step(
            step,
            batch,
            output,
            lr=lr,
            beta2=adam_beta2,
            loss_scale=loss_scale,
            seconds=seconds,
        )

    def _count_step(
        self,
        step: int,
        batch: Batch,
        output: StepOutput,
    ) -> None:
        """Count a step that was tried, and judge it; one that is left out counts as none."""
        update = output.update
        applied = update.check == "ok" and not output.left_out
        if not output.left_out:
            own_tokens = batch.tokens.numel()
            tokens = own_tokens * self.run.grid.dp.size
            self.state.record_step(tokens, applied)
        spikes = self.run.spikes
        grad_norm = update.grad_norm
        spike = spikes.after_step(step, output.loss, grad_norm, applied)
        self.spike = spike
        if spike is not None and self.run.reporter.main:
            logger.warning("%s", spike.describe())
        may_examine = spike is not None and self.examined_step is None
        if may_examine and not applied:
            examine_step(self.run, step, batch, quietly=False)

    def _refuse_endless_skipping(self, step: int) -> None:
        limit = self.config.run.max_consecutive_skips
        if self.run.spikes.consecutive_skips(step) >= limit:
            raise refusals.endless_spikes(step, limit)
        if self.state.consecutive_skips >= limit:
            raise refusals.endless_skipping(step, limit)

    def _save_if_due(self) -> None:
        step = self.state.step
        ckpt = self.config.ckpt
        if step % ckpt.checkpoint_every == 0:  # never for an infinite interval
            self._save()
        elif ckpt.oss_snapshot_freq > 1 and step % ckpt.oss_snapshot_freq == 0:
            self._save(snapshot=True)

    def _save(self, *, snapshot: bool = False, final: bool = False) -> None:
        """Save in the background; only the last save of a run is waited for."""
        run, state = self.run, self.state
        if run.checkpoints is None:
            return
        with self._phase(Place.SAVE):
            if self.saved_step != state.step:
                with run.optimizer.evaluated_weights():
                    run.checkpoints.save(
                        state.step,
                        run.tensors(),
                        run.state_dict(),
                        config_to_dict(self.config),
                        blocking=final,
                        snapshot=snapshot,
                        final=final,
                    )
                # A snapshot is overwritten by a later one, so it does not stand for the
                # checkpoint of its step.
                self.saved_step = None if snapshot else state.step
            if final:
                run.checkpoints.wait(final=True)
                run.reporter.status.note_saves(run.saved_step, saving=False)
