"""Evaluation of a pipeline ends on a network like NCCL's, and keeps all ranks at work."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evomesh.data.batch import Batch
from evomesh.layers.loss import LossOutput
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import MODES
from evomesh.pipeline import schedule
from evomesh.pipeline.evaluation_order import evaluation_slots
from evomesh.pipeline.schedule import PipelineSchedule

D, T = 2, 4
LAYOUTS = [
    (pp, chunks, kind)
    for pp in (2, 3, 4, 5, 8)
    for chunks, kind in (
        (1, "1f1b"),
        (2, "interleaved"),
        (3, "interleaved"),
        (2, "zbv"),
    )
]


class Stage(nn.Module):
    """Passes hidden states on, or reports a loss."""

    def forward(self, x: Tensor, bounds: Any) -> Tensor:
        return torch.zeros(T, D)

    def loss(self, hidden: Tensor, *_: Any) -> LossOutput:
        return LossOutput(
            torch.zeros(()), torch.zeros(T), torch.zeros(T, dtype=torch.bool)
        )


def batch_of(micro_batches: int) -> Batch:
    rows = torch.zeros(micro_batches, T, dtype=torch.long)
    bounds = torch.tensor([[0, T]] * micro_batches, dtype=torch.int32)
    return Batch(rows, rows, rows, rows, bounds, max_seqlen=T)


def operations(
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    pp: int,
    chunks: int,
    kind: str,
    micro_batches: int,
) -> list[tuple[str, int]]:
    """Return ("send" or "receive", other rank) in the order in which ``rank`` evaluates."""
    asked: list[tuple[str, int]] = []

    def send(x: Tensor, axis: Axis, to: int) -> Any:
        asked.append(("send", to))
        return SimpleNamespace(wait=lambda: None)

    def receive(x: Tensor, axis: Axis, source: int) -> Tensor:
        asked.append(("receive", source))
        return x

    monkeypatch.setattr(schedule, "launch_send", send)
    monkeypatch.setattr(schedule, "receive", receive)
    monkeypatch.setattr(schedule, "refuse_zbv", lambda version: None)
    pipeline = PipelineSchedule(
        [Stage() for _ in range(chunks)],
        Grid(pp=Axis("pp", pp, rank)),
        MODES["mtp"],
        schedule=kind,
        hidden_size=D,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    finished: list[int] = []
    pipeline.evaluate(
        batch_of(micro_batches), lambda index, output: finished.append(index)
    )
    has_last = rank == (0 if kind == "zbv" else pp - 1)
    assert finished == (list(range(micro_batches)) if has_last else [])
    return asked


def stuck(queues: dict[Any, deque[tuple[str, int, int]]]) -> int:
    """Let every queue do its first operation once a partner's first one is its counterpart; count what remains.

    Each operation is (kind, own rank, other rank). It is NCCL's rule: what a queue holds runs in order, and a send
    ends when the receive runs.
    """
    counterpart = {"send": "receive", "receive": "send"}
    moved = True
    while moved:
        moved = False
        heads = {queue[0]: queue for queue in queues.values() if queue}
        for kind, rank, other in list(heads):
            partner = (counterpart[kind], other, rank)
            if (kind, rank, other) in heads and partner in heads:
                heads.pop((kind, rank, other)).popleft()
                heads.pop(partner).popleft()
                moved = True
    return sum(map(len, queues.values()))


@pytest.mark.parametrize("queue_per", ["pair", "rank"])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
@pytest.mark.parametrize(("pp", "chunks", "kind"), LAYOUTS)
def test_no_two_ranks_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
    pp: int,
    chunks: int,
    kind: str,
    micro_batches: int,
    queue_per: str,
) -> None:
    """A queue for each rank and peer is NCCL's; one for each rank would hold for a group with one communicator."""
    queues: dict[Any, deque[tuple[str, int, int]]] = {}
    for rank in range(pp):
        for operation, other in operations(
            monkeypatch, rank, pp, chunks, kind, micro_batches
        ):
            key = (rank, other) if queue_per == "pair" else rank
            queues.setdefault(key, deque()).append((operation, rank, other))
    assert sum(map(len, queues.values())) == 2 * micro_batches * (
        pp * chunks - 1 - (kind == "zbv")
    )
    assert stuck(queues) == 0


@pytest.mark.parametrize(
    ("pp", "chunks", "kind"), [layout for layout in LAYOUTS if layout[2] != "zbv"]
)
def test_ranks_are_idle_only_while_the_pipeline_fills_and_drains(
    pp: int, chunks: int, kind: str
) -> None:
    micro_batches = 4 * pp
    slots = evaluation_slots(
        [stage % pp for stage in range(pp * chunks)], micro_batches
    )
    assert len(slots) == micro_batches * chunks + pp - 1
    assert all(len({visit.stage % pp for visit in slot}) == len(slot) for slot in slots)
