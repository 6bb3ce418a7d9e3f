"""The order in which the ranks of a pipeline evaluate, without gradient.

On NCCL all sends and receives between two ranks run one after the other, in the order
in which each rank asked for them, and a send may end only when the other rank receives.
So two ranks that both start with a send hang. Here all ranks follow one list of
messages, and each rank sends and receives its part of it in the order of the list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StageVisit(NamedTuple):
    """One micro-batch passing through one stage."""

    stage: int
    micro_batch: int

    def next(self) -> StageVisit:
        return StageVisit(self.stage + 1, self.micro_batch)


def first_inputs(num_micro_batches: int) -> dict[StageVisit, Tensor]:
    """Return what the first stage is given: the number of each micro-batch, [1] int64."""
    inputs: dict[StageVisit, Tensor] = {}
    for index in range(num_micro_batches):
        visit = StageVisit(0, index)
        inputs[visit] = torch.tensor([index])
    return inputs


def evaluation_slots(
    rank_of_stage: Sequence[int], num_micro_batches: int
) -> list[list[StageVisit]]:
    """Return what the ranks compute in each slot of time: at most one visit per rank.

    After each slot the results travel to their next stages, in the order of the visits
    in the slot. Every stage takes the micro-batches in ascending order.

    Args:
        rank_of_stage: the pipeline rank that holds each stage.
    """
    waiting = [deque[int]() for _ in rank_of_stage]  # micro-batches before each stage
    waiting[0].extend(range(num_micro_batches))
    slots = []
    while any(waiting):
        # A rank with work for several stages takes the last one: it finishes what it
        # has begun, which bounds memory.
        stage_of_rank = {}
        for stage, queue in enumerate(waiting):
            if queue:
                stage_of_rank[rank_of_stage[stage]] = stage
        visits = [
            StageVisit(stage, waiting[stage].popleft())
            for stage in stage_of_rank.values()
        ]
        for visit in visits:
            if visit.stage + 1 < len(waiting):
                waiting[visit.stage + 1].append(visit.micro_batch)
        # Even ranks send first, so that most messages of a slot travel side by side and
        # not one after the other.
        slots.append(
            sorted(visits, key=lambda visit: (rank_of_stage[visit.stage] % 2, visit))
        )
    return slots
