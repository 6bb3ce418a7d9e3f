"""``TrainingAlerts``: what a training run tells people outside, from its start to its end."""

from __future__ import annotations

import math
import os
import shutil
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType

from evomesh.config.alert import AlertConfig
from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.monitor.alerts.alert import AlertKind
from evomesh.monitor.alerts.center import FLUSH_S, AlertCenter
from evomesh.monitor.alerts.heartbeat import HeartbeatSender
from evomesh.monitor.alerts.sender import BackgroundSender
from evomesh.monitor.alerts.spike import LossSpike
from evomesh.monitor.metrics import StepRecord
from evomesh.outside_errors import as_user_error, gigabytes
from evomesh.quantities import counted
from evomesh.train.spikes import SpikeFinding

DISK_CHECK_S = 60.0
TRACEBACK_LINES = 10  # the last ones of a crash
_HEARTBEAT_KEY = "monitor.alert.light_monitor_address"


class TrainingAlerts:
    """Context manager of one rank: raises the alerts of a run, and sends what is left at its end.

    The main rank raises all of them but a crash: that is raised by the first rank that
    claims it, because any rank may be the one that is gone.

    Args:
        config: of the run.
        rank: of this process; until ``attach`` rank 0 is the one that raises alerts.
    """

    def __init__(
        self, config: Config, rank: int, center: AlertCenter | None = None
    ) -> None:
        settings = config.monitor.alert
        self.config: AlertConfig = settings
        self.rank = rank
        if center is None:
            center = AlertCenter.open(settings, config.run.job_name)
        self._center = center
        self._is_main = rank == 0
        self._claim: Path | None = None
        self._spike = LossSpike(settings.loss_spike_ratio)
        self._disks = DiskCheck(self.raise_alert, settings.min_free_gb)
        self._heartbeats: HeartbeatSender | None = None
        address = settings.light_monitor_address
        if address is not None:
            self._heartbeats = HeartbeatSender(_HEARTBEAT_KEY, address, center.job)

    def __enter__(self) -> TrainingAlerts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self.crashed(crash_text(error))
        self.close()

    def close(self, timeout: float = FLUSH_S) -> None:
        """Send what is left, for a few seconds at most."""
        deadline = time.monotonic() + timeout
        self._center.close(timeout)
        if self._heartbeats is not None:
            self._heartbeats.close(deadline)

    def attach(
        self, run_folder: Path, is_main: bool, started: datetime, saves_to: str | None
    ) -> None:
        """Learn where the run writes, and whether this rank speaks for it.

        Args:
            started: the same on every rank, and different in each start of the run.
            saves_to: local folder of its checkpoints, None for any other.
        """
        self._is_main = is_main
        self._center.write_to(run_folder)
        self._claim = run_folder / "logs" / f".crash-{started:%Y%m%d-%H%M%S-%f}"
        self._disks.folders = [run_folder]
        if saves_to is not None:
            self._disks.folders.append(Path(saves_to))

    def raise_alert(self, kind: AlertKind, text: str) -> None:
        """Raise an alert of the job; on the main rank alone."""
        if self._is_main:
            self._center.raise_alert(kind, text)

    def began(self, reason: str, *, resumed: bool, world_size: int) -> None:
        """Report that training starts; ``reason`` is the line that tells from what."""
        kind: AlertKind = "resumed" if resumed else "started"
        self.raise_alert(kind, f"{counted(world_size, 'rank', '')}: {reason}")

    def after_step(
        self,
        record: StepRecord,
        bytes_per_save: int = 0,
        spike: SpikeFinding | None = None,
    ) -> None:
        """Look at the figures of a step; takes microseconds.

        Args:
            spike: what ``spike`` of the config has found, which is reported instead of a loss far above its mean.
        """
        if not self._is_main:
            return
        mean = self._spike.exceeded_mean(record.loss)
        is_finite = math.isfinite(record.loss) and math.isfinite(record.grad_norm)
        if spike is not None and is_finite:
            self.raise_alert("loss spike", spike.describe())
        elif mean is not None:
            self.raise_alert(
                "loss spike",
                f"the loss of step {record.step} is {record.loss:.4f}, and its running mean was {mean:.4f}",
            )
        if not is_finite:
            self.raise_alert(
                "not finite",
                f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}; skipped steps so far: "
                f"{record.inf_nan_skip_batches}",
            )
        self._disks.after_step(bytes_per_save)
        if self._heartbeats is not None:
            self._heartbeats.after_step(record.values())

    def crashed(self, text: str) -> None:
        """Report the error that ends the run, once for all ranks."""
        if self._claim is None:
            speaks = self._is_main
        else:
            speaks = takes_claim(self._claim, otherwise=self._is_main)
        if speaks:
            self._center.raise_alert("crash", f"rank {self.rank}: {text}")

    def ended_by_peer(self, sentence: str) -> None:
        """Report a lost rank before this process ends at once, its main thread stuck."""
        self.crashed(sentence)
        self.close()

    def ended_by_hang(self, sentence: str) -> None:
        """Report a rank that is stuck before all of them end; on the one rank that logs it."""
        self._center.raise_alert("hang", sentence)
        self.close()


class DiskCheck:
    """Looks at the free space of the folders of a run every minute, on a thread: a file system may hang.

    Args:
        raise_alert: gets kind and text.
        min_free_gb: with less than this, or than two checkpoints, a disk is nearly full.
    """

    def __init__(
        self, raise_alert: Callable[[AlertKind, str], None], min_free_gb: float
    ) -> None:
        self.folders: list[Path] = []
        self._raise_alert = raise_alert
        self._min_free = 1e9 * min_free_gb
        self._last_check = -math.inf
        self._checks = BackgroundSender[int](
            "free disk space", self.check, capacity=1, pauses=()
        )

    def after_step(self, bytes_per_save: int) -> None:
        """Start a check if it is time for one; returns at once."""
        now = time.monotonic()
        if now - self._last_check < DISK_CHECK_S:
            return
        self._last_check = now
        self._checks.put(bytes_per_save)

    def check(self, bytes_per_save: int) -> None:
        """Raise an alert for the first folder whose disk is nearly full."""
        limit = max(self._min_free, 2 * bytes_per_save)
        for folder in self.folders:
            try:
                usage = shutil.disk_usage(folder)
            except OSError:
                continue  # not made yet, or gone: the writes report it
            if usage.free < limit:
                self._raise_alert(
                    "disk nearly full",
                    f"{gigabytes(usage.free)} of {gigabytes(usage.total)} are free for {folder}; a checkpoint takes "
                    f"{gigabytes(bytes_per_save)}",
                )
                return


def takes_claim(path: Path, otherwise: bool) -> bool:
    """Return True for the first process of a job that asks, by a file that can be created once."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:  # no folder to claim it in
        return otherwise
    return True


def crash_text(error: BaseException) -> str:
    """Return the message of an error; of a bug, the end of its traceback."""
    message = error if isinstance(error, UserError) else as_user_error(error)
    if message is not None:
        return str(message)
    lines = traceback.format_exception(error)
    return "".join("".join(lines).splitlines(keepends=True)[-TRACEBACK_LINES:])
