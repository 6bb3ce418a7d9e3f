"""Receive buffers of a pipeline, counted: its depth bounds them, not the number of micro-batches."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from evomesh.layers.block_softmax import PLAIN
from evomesh.parallel.modes import MODES
from evomesh.pipeline.torch_stages import BoundedStage
from evomesh.train.stages import build_stages
from tests.dist.layouts import Layout, packs
from tests.support.pool import Pool, grid_of

DEPTH = 4
SCHEDULES = {
    "1f1b": Layout(pipeline=DEPTH),
    "interleaved": Layout(pipeline=DEPTH, chunks=2, model={"num_layers": 8}),
    "zbv": Layout(pipeline=DEPTH, chunks=2, schedule="zbv", model={"num_layers": 8}),
}


class ReceiveBuffers:
    """The tensors that a rank has received into, and how many of them existed at once."""

    def __init__(self) -> None:
        self._received: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def count(self) -> int:
        return sum(reference() is not None for reference in self._received)

    def watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def receive(stage: BoundedStage, micro_batch: int) -> Any:
            operations = method(stage, micro_batch)
            for operation in operations:
                self._received.append(weakref.ref(operation.tensor))
            self.most = max(self.most, self.count())
            return operations

        return receive


def count_buffers(rank: int, layout: Layout, counts: list[int]) -> list[list[int]]:
    """Return the most receive buffers in steps of so many micro-batches, and those left after each."""
    grid = grid_of(pipeline=layout.pipeline)
    stages = build_stages(layout.config, grid, MODES["mtp"], torch.device("cpu"))
    stages.initialize(7, grid)
    rows = []
    for count in counts:
        buffers = ReceiveBuffers()
        batch = packs(0, range(count))
        forward = buffers.watched(BoundedStage.get_fwd_recv_ops)
        backward = buffers.watched(BoundedStage.get_bwd_recv_ops)
        with (
            mock.patch.object(BoundedStage, "get_fwd_recv_ops", forward),
            mock.patch.object(BoundedStage, "get_bwd_recv_ops", backward),
        ):
            stages.schedule.train(batch, [1.0] * count, PLAIN, lambda *_: None)
        rows.append([buffers.most, buffers.count()])
    return rows


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_micro_batches_need_no_more_receive_buffers(
    pool: Pool, schedule: str
) -> None:
    if schedule == "interleaved" and torch.__version__ < "2.13":
        pytest.skip("interleaved schedules of torch 2.11 keep all they have received")
    counts = [2 * DEPTH, 4 * DEPTH, 8 * DEPTH]
    by_rank = pool.run(count_buffers, SCHEDULES[schedule], counts)
    for rank, rows in enumerate(by_rank):
        most = [row[0] for row in rows]
        after = [row[1] for row in rows]
        assert most == [most[0]] * len(counts), (rank, most)
        assert 0 < most[0] <= 4 * DEPTH
        assert after == [0] * len(counts), (rank, after)
