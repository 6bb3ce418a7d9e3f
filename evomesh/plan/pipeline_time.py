"""Time of a pipeline: its ranks' computations in the order of the schedule, each when what it needs has arrived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evomesh.pipeline.action_order import ScheduleAction


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
) -> TimedActions:
    """Return when each rank does each of its actions.

    Args:
        order: actions by rank.
        hop: seconds from one stage to the next.

    Raises:
        ValueError: an order in which ranks wait for each other.
    """
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
