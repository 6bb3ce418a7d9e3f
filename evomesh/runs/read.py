"""Read a run folder: figures of all steps, starts and ends, alerts, ranks. Reads only; imports no torch.

A run that is training, was killed or is old has a page too: a line that cannot be read
is counted and left out, and so is a file that is absent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from evomesh.config.user import expand_home
from evomesh.errors import UserError
from evomesh.monitor.alerts.files import ALERTS_FILE
from evomesh.monitor.history import HISTORY_FILE
from evomesh.monitor.overview import METRICS_FILE, find_run
from evomesh.monitor.spikes import SPIKES_FILE
from evomesh.monitor.status import RankStatus, read_statuses

Row = dict[str, Any]
SAMPLES_FILE = "samples.jsonl"
PLAN_FILE = "plan.json"


@dataclass
class Column:
    """The values of one figure, and the steps that have it."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class StartRecord:
    """One start of a run: its facts, the steps that it did, and how it ended.

    Attributes:
        facts: the "start" line of ``history.jsonl``.
        steps: a line for each step, in the order in which they were done.
        end: the "end" line; empty after a kill, and while it trains.
        rolled_back_at: when the start before it went back to a checkpoint, of a start in the same processes.
    """

    facts: Row
    steps: list[Row] = field(default_factory=list)
    end: Row = field(default_factory=dict)
    rolled_back_at: float | None = None

    @property
    def first_step(self) -> int:
        return int(number_of(self.facts.get("step")) or 0)

    @property
    def began(self) -> float:
        """Return when the processes met, or when they went back to a checkpoint, in Unix seconds."""
        if self.rolled_back_at is not None:
            return self.rolled_back_at
        facts = self.facts
        return number_of(facts.get("began")) or number_of(facts.get("time")) or 0.0

    @property
    def last_time(self) -> float:
        """Return the time of its last line."""
        last_step = self.steps[-1:] or [{}]
        for row in (self.end, *last_step, self.facts):
            moment = number_of(row.get("time"))
            if moment is not None:
                return moment
        return self.began


@dataclass
class RunFiles:
    """The content of a run folder.

    Attributes:
        rows: of ``metrics.jsonl``, by step.
        starts: of ``history.jsonl``; none for a run of an older version.
        spikes: lines of ``spikes.jsonl``.
        samples: of ``samples.jsonl``.
        plan: what ``evomesh plan --json`` printed for it; {} without one.
        unreadable: lines of each file that could not be read.
    """

    folder: Path
    rows: dict[int, Row] = field(default_factory=dict)
    starts: list[StartRecord] = field(default_factory=list)
    alerts: list[Row] = field(default_factory=list)
    spikes: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    plan: Row = field(default_factory=dict)
    ranks: list[RankStatus] = field(default_factory=list)
    unreadable: dict[str, int] = field(default_factory=dict)

    @property
    def facts(self) -> Row:
        """Return the facts of the last start; {} if none is recorded."""
        return self.starts[-1].facts if self.starts else {}

    @property
    def world_size(self) -> int:
        recorded = number_of(self.facts.get("world_size"))
        return int(recorded or max(len(self.ranks), 1))

    def world_sizes(self, steps: Iterable[int]) -> list[int]:
        """Return how many ranks did each step: those of the last start that began at or before it."""
        sizes = []
        for step in steps:
            size = self.world_size
            for start in reversed(self.starts):
                if start.first_step <= step:
                    size = int(number_of(start.facts.get("world_size")) or size)
                    break
            sizes.append(size)
        return sizes

    def sorted_rows(self) -> list[Row]:
        """Return the figures of all steps in their order."""
        return [self.rows[step] for step in sorted(self.rows)]

    def columns(self) -> dict[str, Column]:
        """Return every figure by its name."""
        return columns_of(self.sorted_rows())


def find_runs(paths: Iterable[str]) -> list[Path]:
    """Return the run folder that each path means.

    Raises:
        UserError: there is none.
    """
    return [find_run(expand_home(path)) for path in paths]


def read_run(folder: Path) -> RunFiles:
    """Read everything that a run folder has.

    Raises:
        UserError: a file cannot be opened.
    """
    run = RunFiles(folder)
    run.rows = _rows_by_step(run, _objects(run, METRICS_FILE))
    run.starts = starts_of(_objects(run, HISTORY_FILE))
    run.alerts = _objects(run, ALERTS_FILE)
    run.spikes = _objects(run, SPIKES_FILE)
    run.samples = _objects(run, SAMPLES_FILE)
    plan_file = folder / PLAN_FILE
    if plan_file.is_file():
        run.plan = read_plan(plan_file)
    try:
        run.ranks = read_statuses(folder)
    except OSError:
        run.unreadable["status"] = 1
    return run


def read_plan(path: Path) -> Row:
    """Return what ``evomesh plan --json`` printed.

    Raises:
        UserError: the file cannot be read, or has something else.
    """
    try:
        value = orjson.loads(path.read_bytes())
    except OSError as error:
        raise _not_read(path, error) from None
    except ValueError:
        value = None
    if not isinstance(value, dict) or "gpus" not in value:
        raise UserError(
            "it is not a plan",
            where=str(path),
            expected="a JSON object with gpus, tokens_per_step and peak",
            fix=f"evomesh plan CONFIG --gpus N --json > {path}",
            code="EVO-RUN-001",
        )
    return value


def columns_of(rows: Iterable[Row]) -> dict[str, Column]:
    """Return every number of the rows by its name; texts that are no numbers are left out."""
    columns: dict[str, Column] = {}
    for row in rows:
        step = row["step"]
        for name, value in row.items():
            number = number_of(value)
            if number is None:
                continue
            column = columns.get(name)
            if column is None:
                column = columns[name] = Column()
            column.steps.append(step)
            column.values.append(number)
    return columns


def number_of(value: Any) -> float | None:
    """Return a figure of ``metrics.jsonl``; None for what is not one. NaN and infinity are written as texts."""
    if type(value) is float or type(value) is int:
        return value
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return None


def starts_of(rows: Iterable[Row]) -> list[StartRecord]:
    """Return the lines of ``history.jsonl`` by the start that wrote them."""
    starts: list[StartRecord] = []
    for row in rows:
        event = row.get("event")
        if event == "start":
            start = StartRecord(row)
            if starts and _is_same_process(starts[-1], start):
                start.rolled_back_at = starts[-1].last_time
            starts.append(start)
        elif not starts:
            continue  # the line of the start is lost
        elif event == "end":
            starts[-1].end = row
        elif isinstance(row.get("step"), int):
            starts[-1].steps.append(row)
    return starts


def _is_same_process(earlier: StartRecord, later: StartRecord) -> bool:
    """Return whether both starts are of processes that met once: they went back to a checkpoint in between."""
    began = number_of(later.facts.get("began"))
    return began is not None and began == number_of(earlier.facts.get("began"))


def _objects(run: RunFiles, name: str) -> list[Row]:
    """Return the JSON objects of a file of lines, and count in ``run`` the lines that are none."""
    path = run.folder / name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _not_read(path, error) from None
    objects, unreadable = parse_lines(content.splitlines())
    if unreadable:
        run.unreadable[name] = unreadable
    return objects


def _not_read(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read it: {error.strerror or error}",
        where=str(path),
        code="EVO-SYS-001",
    )


def parse_lines(lines: Iterable[bytes]) -> tuple[list[Row], int]:
    """Return the JSON objects of the lines, and how many lines are none."""
    objects: list[Row] = []
    unreadable = 0
    for line in lines:
        try:
            value = orjson.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if isinstance(value, dict):
            objects.append(value)
        else:
            unreadable += 1
    return objects, unreadable


def _rows_by_step(run: RunFiles, rows: Iterable[Row]) -> dict[int, Row]:
    """Return the figures by step; where a step is there twice, as in old files, the later line counts."""
    by_step = {}
    without_step = 0
    for row in rows:
        step = row.get("step")
        if type(step) is int and step >= 0:
            by_step[step] = row
        else:
            without_step += 1
    if without_step:
        earlier = run.unreadable.get(METRICS_FILE, 0)
        run.unreadable[METRICS_FILE] = earlier + without_step
    return by_step
