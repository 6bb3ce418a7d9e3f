"""``RunOverview``: what the files of a run folder tell about it, for ``evomesh top``. Reads only; imports no torch."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from evomesh.errors import UserError
from evomesh.monitor.alerts.files import ALERTS_FILE
from evomesh.monitor.metrics import TGS
from evomesh.monitor.status import FOLDER, RankStatus, read_statuses

METRICS_FILE = "metrics.jsonl"
TAIL_BYTES = 256 * 1024  # of a file that grows
SILENT_S = 10.0  # a rank writes every second


@dataclass(frozen=True)
class RunOverview:
    """A run at one moment.

    Attributes:
        now: the moment, in Unix seconds.
        ranks: in their order.
        metrics: figures of the last step; empty before the first one.
        alerts: newest last.
    """

    folder: Path
    now: float
    ranks: list[RankStatus] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def state(self) -> str:
        """Return one word: "running", "done", "stopped", "failed", "silent" or, without records, "unknown"."""
        if not self.ranks:
            return "unknown"
        for phase in ("failed", "stopped"):
            if any(rank.phase == phase for rank in self.ranks):
                return phase
        if all(rank.has_ended for rank in self.ranks):
            return "done"
        if all(self.is_silent(rank) for rank in self.ranks if not rank.has_ended):
            return "silent"
        return "running"

    def is_silent(self, rank: RankStatus) -> bool:
        """Return whether a rank that has not ended does not write any more."""
        return not rank.has_ended and self.now - rank.time > SILENT_S

    def figure(self, name: str) -> float | None:
        """Return a figure of the last step, None if it is absent; NaN and infinity are written as texts."""
        value = self.metrics.get(name)
        return None if value is None else float(value)

    @property
    def tokens_per_second(self) -> float | None:
        """Return the speed of the whole run in its last step."""
        tgs = self.figure(TGS)
        return None if tgs is None else tgs * max(len(self.ranks), 1)


def read_overview(folder: Path, now: float) -> RunOverview:
    """Return what the files of a run folder tell at the moment ``now``.

    Raises:
        OSError: a file cannot be read.
    """
    ranks = read_statuses(folder)
    rows = last_objects(folder / METRICS_FILE, 1)
    alerts = last_objects(folder / ALERTS_FILE, 100)
    metrics = rows[-1] if rows else {}
    return RunOverview(folder, now, ranks, metrics, alerts)


def last_objects(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the last JSON objects of a file of lines; none of a file that does not exist."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    objects: list[dict[str, Any]] = []
    for line in reversed(lines):
        if len(objects) == count:
            break
        try:
            value = json.loads(line)
        except ValueError:  # half a line, at either end
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects[::-1]


def seconds_of(time: Any) -> float | None:
    """Return a time such as ``2026-01-31T23:59:59+00:00`` in Unix seconds, None if it is not one."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError):
        return None


def find_run(path: Path) -> Path:
    """Return the run folder that a path means: itself, or the one below it that was written last.

    Raises:
        UserError: there is none.
    """
    if _is_run(path):
        return path
    candidates = []
    if path.is_dir():
        for pattern in ("*", "*/*"):
            candidates += [folder for folder in path.glob(pattern) if _is_run(folder)]
    if candidates:
        return max(candidates, key=_last_written)
    found = (
        "is not a run folder, and has none below it"
        if path.exists()
        else "does not exist"
    )
    raise UserError(
        f"{path} {found}",
        expected="a run folder such as RUN/JOB_NAME/01-31-12.00.00, the folder of a job, or RUN",
        fix="the log of a run names its folder: grep 'run folder:'",
        code="EVO-RUN-001",
    )


def wait_for_run(path: Path, every_s: float) -> Path:
    """Return the run folder that a path means, once it is there; say on stderr if there is none yet.

    Args:
        every_s: seconds between two looks.
    """
    has_notified = False
    while True:
        try:
            return find_run(path)
        except UserError:
            if not has_notified:
                place = path.absolute()
                line = f"no run in {place} yet: waiting for one; Ctrl-C ends this"
                print(line, file=sys.stderr, flush=True)
                has_notified = True
            time.sleep(every_s)


def _is_run(folder: Path) -> bool:
    return (folder / FOLDER).is_dir() or (folder / METRICS_FILE).is_file()


def _last_written(folder: Path) -> float:
    times = [folder.stat().st_mtime]
    for path in (folder / METRICS_FILE, *folder.glob(f"{FOLDER}/*.jsonl")):
        if path.exists():
            times.append(path.stat().st_mtime)
    return max(times)
