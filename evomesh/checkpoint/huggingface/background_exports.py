"""Exports of a run's checkpoints while it trains: one at a time, each in a separate process.

    the writer commits a checkpoint    committed()    it waits for its turn, in place of one that waited before
    the thread "export"                               starts a process, reports its end, deletes old exports
    the writer deletes old checkpoints in_use()       not those that are, or will be, exported
    the run is over                    finish()       the last checkpoint, and the export in progress, are waited for

Nothing here raises an error into the run: what goes wrong is one warning.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evomesh.checkpoint.huggingface.export_job import END_S, ExportJob
from evomesh.checkpoint.huggingface.exported_folder import (
    delete_old,
    delete_unfinished,
    export_name,
    read_mark,
    run_name,
)
from evomesh.checkpoint.huggingface.start_export import ExportProcess, RunningExport
from evomesh.checkpoint.native.format import CommitRecord
from evomesh.config.export_hf import export_folder
from evomesh.config.schema import CheckpointConfig
from evomesh.errors import UserError
from evomesh.monitor.log import ALL_RANKS
from evomesh.storage.base import StorageLock
from evomesh.storage.local import LocalStorage
from evomesh.storage.urls import split_url

logger = logging.getLogger(__name__)
GRACE_S = 10.0  # how long a run that a signal stopped waits for the export in progress
POLL_S = 0.1
DIFFERENCE = "largest logit difference"  # how the lines of a comparison begin


@dataclass(frozen=True)
class ExportPlan:
    """The choice of checkpoints that a run exports, and the place where they go.

    Attributes:
        save_folder: as in the config; the checkpoints are in it.
        root: folder of the exports.
        every: steps; None: every checkpoint.
        keep: number of exports to keep; None: all.
        dtype: None: as trained.
    """

    save_folder: str
    root: Path
    every: int | None = None
    keep: int | None = None
    dtype: str | None = None

    @staticmethod
    def of(config: CheckpointConfig) -> ExportPlan | None:
        """Return what a config asks for, None if it is nothing."""
        folder = export_folder(config)
        if folder is None or config.save_ckpt_folder is None:
            return None
        _, path = split_url(folder)
        wanted = config.export_hf
        return ExportPlan(
            config.save_ckpt_folder,
            Path(path),
            wanted.every,
            wanted.keep,
            wanted.dtype,
        )

    def wants(self, step: int) -> bool:
        """Return whether the checkpoint of a step is exported wherever it is in the run."""
        return self.every is None or step % self.every == 0

    def job(self, folder: str, record: CommitRecord) -> ExportJob:
        """Return what to export for a checkpoint in the step folder ``folder``."""
        name = folder.rpartition("/")[2]
        return ExportJob(
            checkpoint=f"{self.save_folder.rstrip('/')}/{name}",
            step=record.step,
            attempt=record.attempt,
            out=str(self.root / export_name(name)),
            run=run_name(self.save_folder, self.root),
            dtype=self.dtype,
        )


class BackgroundExports:
    """Exports checkpoints in the order of their commits, the newest first where they come faster.

    The writer of the checkpoints calls ``committed`` and ``in_use`` on rank 0; on other
    ranks it has nothing to do.
    """

    def __init__(
        self,
        plan: ExportPlan,
        start_export: Callable[[ExportJob], RunningExport] = ExportProcess,
    ) -> None:
        self._plan = plan
        self._start_export = start_export
        self._changed = threading.Condition()
        self._newest: _Request | None = None
        self._waiting: _Request | None = None
        self._running: _Request | None = None
        self._process: RunningExport | None = None
        self._is_started = False
        self._is_given_up = False
        self._thread: threading.Thread | None = None
        self._lock: StorageLock | None = None
        self._tried: set[str] = set()  # folders to write
        self._noted: set[str] = set()  # lines that were logged

    def start(self) -> None:
        """Begin to export: this job is now the only writer of the save folder."""
        with self._changed:
            self._is_started = True
            if self._newest is not None:
                self._wake()

    def committed(self, folder: str, record: CommitRecord) -> None:
        """Take note of a checkpoint that can be read from now on."""
        request = _Request(folder, self._plan.job(folder, record))
        self._newest = request
        if self._plan.wants(record.step):
            self._request(request)

    def in_use(self) -> frozenset[str]:
        """Return the step folders that an export reads or is going to read."""
        with self._changed:
            requests = (self._running, self._waiting)
            return frozenset(request.folder for request in requests if request)

    def _request(self, request: _Request) -> None:
        """Let a checkpoint be the next to be exported, unless it has been."""
        if _is_exported(request.job):
            return
        with self._changed:
            # One that failed is not tried again: its warning has the command.
            if self._running == request or request.job.out in self._tried:
                return
            replaced = self._waiting
            self._waiting = request
            if self._is_started:
                self._wake()
        if replaced is not None and replaced != request:
            _log(
                f"step {replaced.job.step} is not exported: step {request.job.step} was saved before its turn came"
            )

    def _wake(self) -> None:
        """Let the thread see what is waiting; the caller holds the lock."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name="export", daemon=True
            )
            self._thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        """Export one checkpoint after the other."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                self._running = self._waiting
                self._waiting = None
                request = self._running
            assert request is not None
            try:
                self._export(request.job)
            except Exception as error:  # must not end the thread, let alone the run
                self._warn(request.job, f"{type(error).__name__}: {error}")
            with self._changed:
                self._running = None
                self._tried.add(request.job.out)
                self._changed.notify_all()

    def _export(self, job: ExportJob) -> None:
        """Export one checkpoint, report it, and delete old exports."""
        started = time.monotonic()
        try:
            self._take_folder()
            process = self._start_export(job)
        except (OSError, UserError) as error:
            found = error.found if isinstance(error, UserError) else str(error)
            self._warn(job, found)
            return
        with self._changed:
            self._process = process
            is_too_late = self._is_given_up
        if is_too_late:
            process.end()
        result = process.wait()
        with self._changed:
            self._process = None
        if result.error:
            self._warn(job, result.error)
            delete_unfinished(self._plan.root)  # what it could not delete itself
            return
        seconds = time.monotonic() - started
        checks = [line for line in result.lines if line.startswith(DIFFERENCE)]
        words = "; ".join([f"{job.out} ({seconds:.0f} s)", *checks])
        _log(f"step {job.step} exported: {words}")
        self._report_notes(result.lines)
        self._delete_old(job)

    def _report_notes(self, lines: Sequence[str]) -> None:
        """Log once what an export says besides its comparisons and the folder it wrote."""
        for line in lines:
            is_usual = line.startswith((DIFFERENCE, "wrote "))
            if not is_usual and line not in self._noted:
                self._noted.add(line)
                _log(line)

    def _take_folder(self) -> None:
        """Make this job the one that exports to the folder, and delete what a killed one left.

        Raises:
            UserError: another job exports to it.
        """
        if self._lock is not None:
            return
        root = self._plan.root
        self._lock = LocalStorage().lock(
            str(root / ".writer"), f"process {os.getpid()}"
        )
        delete_unfinished(root)

    def _delete_old(self, job: ExportJob) -> None:
        if self._plan.keep is None:
            return
        keep = self._plan.keep
        deleted = delete_old(self._plan.root, job.run, keep, job.step, self._warn_once)
        for folder in deleted:
            _log(f"deleted {folder}")

    def _warn_once(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            logger.warning("%s", line, extra=ALL_RANKS)

    def _warn(self, job: ExportJob, cause: str) -> None:
        """Report an export that failed or was given up."""
        if self._is_given_up:
            _log(f"the export of step {job.step} was given up; by hand: {job.command}")
            return
        logger.warning(
            "step %d was not exported (%s); training is not affected; by hand: %s",
            job.step,
            cause,
            job.command,
            extra=ALL_RANKS,
        )

    def finish(self, *, is_complete: bool, should_stop: Callable[[], bool]) -> None:
        """Wait for the export in progress, and for that of the last checkpoint if the run is complete.

        Args:
            is_complete: False: a signal stopped the run, which must end soon. Then what
                waits is not exported, and what is in progress has ``GRACE_S`` left.
            should_stop: whether a signal has arrived since; from then on the same holds.
        """
        if self._newest is None or not self._is_started:
            return
        if not is_complete or should_stop():
            self._drop_waiting()
            self._wait(lambda: True)
        else:
            self._request(self._newest)
            self._wait(should_stop)
        self.give_up()

    def _wait(self, should_stop: Callable[[], bool]) -> None:
        """Wait until nothing is left to export, but not for longer than ``GRACE_S`` once the run should stop."""
        with self._changed:
            request = self._running or self._waiting
            if request is not None:
                how_long = f"a signal ends the wait after {GRACE_S:g} s"
                if should_stop():
                    how_long = f"at most {GRACE_S:g} s"
                _log(f"waiting for the export of step {request.job.step} ({how_long})")
            deadline = math.inf
            while self._running is not None or self._waiting is not None:
                now = time.monotonic()
                if now > deadline:
                    return
                if should_stop():
                    deadline = min(deadline, now + GRACE_S)
                self._changed.wait(POLL_S)

    def _drop_waiting(self) -> None:
        """Take what waits for its turn off the list."""
        with self._changed:
            dropped = self._waiting
            self._waiting = None
        if dropped is not None:
            job = dropped.job
            _log(f"step {job.step} is not exported; by hand: {job.command}")

    def give_up(self) -> None:
        """End the export in progress, if there is one; nothing is exported from now on."""
        self._drop_waiting()
        with self._changed:
            self._is_given_up = True
            process = self._process
        if process is not None:
            process.end()
        with self._changed:
            self._changed.wait_for(lambda: self._running is None, timeout=END_S)
        if self._lock is not None:
            self._lock.release()
            self._lock = None


@dataclass(frozen=True)
class _Request:
    """A checkpoint to export: its step folder as the writer names it, and the job."""

    folder: str
    job: ExportJob


def _is_exported(job: ExportJob) -> bool:
    """Return whether there is a complete export of a checkpoint already."""
    mark = read_mark(Path(job.out))
    return mark is not None and mark.files is not None and mark.attempt == job.attempt


def _log(line: str) -> None:
    logger.info("%s", line, extra=ALL_RANKS, stacklevel=2)


@contextmanager
def running_exports(config: CheckpointConfig) -> Iterator[BackgroundExports | None]:
    """Yield the exports that a config asks for, None without any; an error ends those in progress."""
    plan = ExportPlan.of(config)
    if plan is None:
        yield None
        return
    exports = BackgroundExports(plan)
    with contextlib.ExitStack() as stack:
        stack.callback(exports.give_up)
        yield exports
