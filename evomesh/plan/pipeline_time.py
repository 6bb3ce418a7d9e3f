"""Time of a pipeline: its ranks' computations in the order of the schedule, each when what it needs has arrived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evomesh.pipeline.action_order import ScheduleAction
from evomesh.plan.shared_cores import CoreShare, SharedCores


@dataclass(frozen=True)
class StageSeconds:
    """Time that one stage takes for forward and backward of one micro-batch."""

    forward: float
    backward: float

    def of(self, kind: str) -> float:
        """Return the time of an action; the gradients of inputs and of weights are half of backward each."""
        if kind == "F":
            return self.forward
        return self.backward if kind == "B" else self.backward / 2

    def divided(self, turns: float) -> StageSeconds:
        """Return the times of a rank that need not take turns with others."""
        return StageSeconds(self.forward / turns, self.backward / turns)


class TimedAction(NamedTuple):
    """Action of a rank, with its start and end."""

    action: ScheduleAction
    start: float
    end: float


# By rank, in the order in which it does them.
TimedActions = dict[int, list[TimedAction]]


def pipeline_seconds(
    order: Mapping[int, Sequence[ScheduleAction]],
    stages: Sequence[StageSeconds],
    hop: float,
) -> float:
    """Return when the last rank has done all of its actions; arguments as of ``timed_actions``."""
    return last_end(timed_actions(order, stages, hop))


def last_end(timed: TimedActions) -> float:
    """Return when the last rank has done all of its actions."""
    ends = []
    for actions in timed.values():
        ends.append(actions[-1].end)
    return max(ends)


def timed_actions(
    order: Mapping[int, Sequence[ScheduleAction]],
    stages: Sequence[StageSeconds],
    hop: float,
    sharing: SharedCores | None = None,
) -> TimedActions:
    """Return when each rank does each of its actions.

    Args:
        order: actions by rank.
        hop: seconds from one stage to the next.
        sharing: cores on which the ranks take turns; None where each has its own device.

    Raises:
        ValueError: an order in which ranks wait for each other.
    """
    if sharing is not None:
        return _actions_on_cores(order, stages, hop, sharing)
    last = len(stages) - 1
    done: dict[ScheduleAction, float] = {}
    timed: TimedActions = {rank: [] for rank in order}
    clock = dict.fromkeys(order, 0.0)
    left = sum(map(len, order.values()))
    while left:
        before = left
        for rank, actions in order.items():
            # A rank continues until it needs what no other has computed yet.
            while len(timed[rank]) < len(actions):
                action = actions[len(timed[rank])]
                ready = _ready_at(action, done, hop, last)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                end = start + stages[action.stage].of(action.kind)
                done[action] = end
                clock[rank] = end
                timed[rank].append(TimedAction(action, start, end))
                left -= 1
        if left == before:
            raise ValueError("the ranks of the pipeline wait for each other")
    return timed


def _actions_on_cores(
    order: Mapping[int, Sequence[ScheduleAction]],
    stages: Sequence[StageSeconds],
    hop: float,
    sharing: SharedCores,
) -> TimedActions:
    """Return the same where ranks that compute at the same time share cores."""
    last = len(stages) - 1
    done: dict[ScheduleAction, float] = {}
    timed: TimedActions = {rank: [] for rank in order}
    left = {}
    for rank, actions in order.items():
        left[rank] = list(actions)
    share = CoreShare(sharing)
    running: dict[int, ScheduleAction] = {}
    while any(left.values()) or running:
        # 1. Begin what can begin now; for others it is known when their input arrives.
        arrivals = []
        for rank in _free_ranks(left, running):
            action = left[rank][0]
            ready = _ready_at(action, done, hop, last)
            if ready is not None and ready <= share.now:
                running[rank] = left[rank].pop(0)
                seconds = stages[action.stage].of(action.kind)
                share.begin(rank, seconds)
            elif ready is not None:
                arrivals.append(ready)

        # 2. The clock moves to the next end or arrival.
        if not running and not arrivals:
            raise ValueError("the ranks of the pipeline wait for each other")
        for rank, start in share.advance(arrivals):
            action = running.pop(rank)
            done[action] = share.now
            finished = TimedAction(action, start, share.now)
            timed[rank].append(finished)
    return timed


def _free_ranks(
    left: Mapping[int, Sequence[ScheduleAction]],
    running: Mapping[int, ScheduleAction],
) -> list[int]:
    """Return the ranks that compute nothing and have something left to do."""
    return [rank for rank, actions in left.items() if actions and rank not in running]


def _ready_at(
    action: ScheduleAction,
    done: Mapping[ScheduleAction, float],
    hop: float,
    last: int,
) -> float | None:
    """Return when the input of an action has arrived; None if it has not been computed."""
    stage, kind, micro_batch = action
    if kind == "W":
        return 0.0  # its rank has computed the gradients of inputs before
    if kind == "F":
        if stage == 0:
            return 0.0
        return _arrival(done, [ScheduleAction(stage - 1, "F", micro_batch)], hop)
    if stage == last:
        return _arrival(done, [ScheduleAction(stage, "F", micro_batch)], 0.0)
    sources = [
        ScheduleAction(stage + 1, "B", micro_batch),
        ScheduleAction(stage + 1, "I", micro_batch),
    ]
    return _arrival(done, sources, hop)


def _arrival(
    done: Mapping[ScheduleAction, float],
    sources: Sequence[ScheduleAction],
    hop: float,
) -> float | None:
    for source in sources:
        if source in done:
            return done[source] + hop
    return None
