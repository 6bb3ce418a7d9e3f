"""The order in which the ranks of a pipeline compute, for predictions: the schedules themselves are torch's."""

from __future__ import annotations

from typing import Any, NamedTuple


class ScheduleAction(NamedTuple):
    """One computation of a pipeline.

    Attributes:
        kind: "F", "B", or where backward is divided "I" for the gradients of inputs and "W" for those of weights.
    """

    stage: int
    kind: str
    micro_batch: int


def one_forward_one_backward(
    num_stages: int, num_micro_batches: int
) -> dict[int, list[ScheduleAction]]:
    """Return the order of 1F1B, or of GPipe where there are fewer micro-batches than stages."""
    order = {}
    for rank in range(num_stages):
        # As many forwards ahead as it takes a micro-batch to come back from the last stage.
        ahead = min(num_stages - rank, num_micro_batches)
        if num_micro_batches < num_stages:
            ahead = num_micro_batches
        actions = []
        for index in range(num_micro_batches + ahead):
            if index < num_micro_batches:
                actions.append(ScheduleAction(rank, "F", index))
            if index >= ahead - 1 and index - ahead + 1 < num_micro_batches:
                actions.append(ScheduleAction(rank, "B", index - ahead + 1))
        order[rank] = actions
    return order


def read_order(schedule: Any) -> dict[int, list[ScheduleAction]]:
    """Return the order of one of torch's schedules of several stages per rank."""
    order = {}
    for rank, actions in schedule.pipeline_order.items():
        own = []
        for action in actions:
            if action is None:
                continue  # a slot in which the rank has nothing to do
            kind = action.computation_type.value
            own.append(
                ScheduleAction(action.stage_index, kind, action.microbatch_index)
            )
        order[rank] = own
    return order
