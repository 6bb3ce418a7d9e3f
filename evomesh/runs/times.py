"""The wall time of a run by cause: useful training, and what it lost to each.

Every second between the first start and the last line is counted once, so the causes add
up to the wall time:

    useful        forward, backward and update of steps whose result was kept
    recomputed    steps that a later start did again, since the last checkpoint before it
    data wait, validation, save
    start         from the first process to the first step, of each start
    down          between the end of a start and the begin of the next
    other         log, metrics, diagnosis, the end, and steps that a kill left unfinished
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from evomesh.runs.read import Row, StartRecord, number_of

CAUSES = (
    "useful",
    "recomputed",
    "data wait",
    "validation",
    "save",
    "start",
    "down",
    "other",
)
_PHASE_CAUSES = {"data wait": "data wait", "validation": "validation", "save": "save"}


@dataclass
class StartCost:
    """The work of one start of a run, and the cost of beginning again.

    Attributes:
        down: seconds since the start before it ended; 0 for the first.
        starting: seconds until its first step began.
        recomputed: steps that it did again; ``recomputed_seconds`` those took the first time.
        outcome: "done", "stopped", "failed", "rolled back", or "" where no end is recorded.
        is_rollback: whether the processes of the start before it went back, instead of new ones.
    """

    number: int
    began: float
    first_step: int
    steps: int
    outcome: str
    reason: str
    down: float = 0.0
    starting: float = 0.0
    recomputed: int = 0
    recomputed_seconds: float = 0.0
    is_rollback: bool = False

    @property
    def cost(self) -> float:
        """Return the seconds that were lost because the run had to start again; 0 for the first start."""
        if self.number == 1:
            return 0.0
        return self.down + self.starting + self.recomputed_seconds


@dataclass
class TimeAccount:
    """The wall time of a run by cause, in seconds."""

    wall: float = 0.0
    causes: dict[str, float] = field(default_factory=dict)
    starts: list[StartCost] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Return useful time / wall time, NaN for a run without time."""
        return self.causes["useful"] / self.wall if self.wall > 0 else math.nan


def account_for(starts: Sequence[StartRecord]) -> TimeAccount | None:
    """Return where the time went, None if the run has no history."""
    if not starts:
        return None
    wall = starts[-1].last_time - starts[0].began
    causes = dict.fromkeys(CAUSES, 0.0)
    account = TimeAccount(max(0.0, wall), causes)
    for index, start in enumerate(starts):
        later = starts[index + 1 :]
        first_steps = [other.first_step for other in later]
        # Steps from here on were lost with the start, and done again by a later one.
        lost_from = min(first_steps, default=None)
        _count_steps(account, start, lost_from)
        cost = _cost_of_start(index, starts)
        account.starts.append(cost)
        causes["start"] += cost.starting
        causes["down"] += cost.down
    counted = sum(causes.values())
    not_counted = account.wall - counted
    causes["other"] += max(0.0, not_counted)
    return account


def _cost_of_start(index: int, starts: Sequence[StartRecord]) -> StartCost:
    start = starts[index]
    cost = StartCost(
        number=index + 1,
        began=start.began,
        first_step=start.first_step,
        steps=len(start.steps),
        outcome=str(start.end.get("outcome", "")),
        reason=str(start.facts.get("reason", "")),
        starting=_starting_seconds(start),
        is_rollback=start.rolled_back_at is not None,
    )
    if _went_back(index, starts):
        cost.outcome = "rolled back"
    if index:
        cost.down = max(0.0, start.began - starts[index - 1].last_time)
        lost = lost_steps(starts, index)
        cost.recomputed = len(lost)
        cost.recomputed_seconds = sum(seconds_of_row(row) for row in lost)
    return cost


def _went_back(index: int, starts: Sequence[StartRecord]) -> bool:
    """Return whether the next start is of the same processes."""
    is_last = index + 1 == len(starts)
    return not is_last and starts[index + 1].rolled_back_at is not None


def lost_steps(starts: Sequence[StartRecord], index: int) -> list[Row]:
    """Return the steps of earlier starts that this one was the first to throw away."""
    first_step = starts[index].first_step
    lost = []
    # A step that was lost twice has two lines, and each belongs to the start after its own.
    for number, earlier in enumerate(starts[:index]):
        between = [other.first_step for other in starts[number + 1 : index]]
        already_lost_from = min(between, default=None)
        for row in earlier.steps:
            step = row["step"]
            is_lost_already = already_lost_from is not None and (
                step >= already_lost_from
            )
            if step >= first_step and not is_lost_already:
                lost.append(row)
    return lost


def seconds_of_row(row: Row) -> float:
    """Return how long a step took, validation and save included."""
    return number_of(row.get("seconds")) or 0.0


def _starting_seconds(start: StartRecord) -> float:
    if start.steps:
        first = start.steps[0]
        ended = number_of(first.get("time"))
        seconds = seconds_of_row(first)
    else:
        ended = number_of(start.facts.get("time"))
        seconds = 0.0
    ready = (ended or start.began) - seconds
    return max(0.0, ready - start.began)


def _count_steps(
    account: TimeAccount, start: StartRecord, lost_from: int | None
) -> None:
    causes = account.causes
    for row in start.steps:
        seconds = seconds_of_row(row)
        if lost_from is not None and row["step"] >= lost_from:
            causes["recomputed"] += seconds
            continue
        causes["useful"] += seconds - _count_phases(causes, row)
    _count_phases(causes, start.end)


def _count_phases(causes: dict[str, float], row: Row) -> float:
    """Add the phases of a line to their causes; return their seconds."""
    total = 0.0
    phases = row.get("phases")
    if not isinstance(phases, dict):
        return total
    for name, value in phases.items():
        seconds = number_of(value) or 0.0
        cause = _PHASE_CAUSES.get(name, "other")
        causes[cause] += seconds
        total += seconds
    return total
