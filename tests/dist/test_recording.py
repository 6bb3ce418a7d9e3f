"""What the watchdog's record holds of a step: collectives, FSDP2's and transfers, beside what the dispatcher saw."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed.pipelining import schedules

from evomesh.layers.block_softmax import PLAIN
from evomesh.parallel.traffic import group_names, record_traffic
from evomesh.watchdog import ring
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import RingState
from tests.dist.layouts import Layout, packs, stages_of
from tests.support.pool import Pool

NAMES = {"receive": "recv"}
FSDP = {"zero1": {"fsdp": True}}
LAYOUTS = [
    Layout(ranks=2, tensor=2, mode="msp", packs=2),
    Layout(ranks=2, parallel=FSDP, packs=2),
    Layout(ranks=2, mode="isp", weight=2, parallel={"weight": {"overlap": True}}),
    Layout(ranks=2, mode="isp", weight=2, parallel={"weight": {"overlap": False}}),
    Layout(ranks=2, pipeline=2),
    Layout(ranks=2, pipeline=2, chunks=2),
    Layout(ranks=2, pipeline=2, chunks=2, schedule="zbv"),
]


@dataclass
class Recorded:
    """A step's calls by (operation, axis, bytes), as recorded and as dispatched, and where this rank was seen."""

    calls: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    dispatched: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    entered: dict[str, int] = field(default_factory=dict)
    waits: set[str] = field(default_factory=set)
    computes_in: set[str] = field(default_factory=set)
    left_in: list[str] = field(default_factory=list)


def read(folder: Path) -> RingState:
    state = ring.read_ring((folder / "0.ring").read_bytes())
    assert state is not None
    return state


def innermost(folder: Path) -> str:
    frames = read(folder).frames
    return frames[-1].place.name if frames else ""


def record_step(rank: int, layout: Layout) -> Recorded:
    stages, grid = stages_of(layout)
    batch = packs(0, range(layout.packs))
    found = Recorded()

    def train() -> None:
        stages.schedule.train(batch, [1.0] * layout.packs, PLAIN, lambda *_: None)

    train()  # torch agrees on shapes once
    names = group_names(grid)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wait = schedules._wait_batch_p2p

        def watched(works: Any) -> None:
            if works:
                found.waits.add(innermost(folder))
            wait(works)

        for model in stages.models:
            model.register_forward_pre_hook(
                lambda *_: found.computes_in.add(innermost(folder))
            )
        this_process().open(folder, 0)
        try:
            with (
                mock.patch.object(schedules, "_wait_batch_p2p", watched),
                record_traffic(grid) as traffic,
            ):
                train()
            state = read(folder)
        finally:
            this_process().close()
    assert len(state.entries) < ring.ENTRIES
    for entry in state.entries:
        operation = NAMES.get(entry.operation.words, entry.operation.words)
        axis = names[entry.group.partition(":")[2]]
        found.calls[operation, axis, entry.nbytes] += 1
    for call in traffic.calls:
        found.dispatched[call.operation, call.axis, call.nbytes] += 1
    found.entered = state.entered
    found.left_in = [frame.place.name for frame in state.frames]
    return found


def without_bytes(calls: Counter[tuple[str, str, int]]) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for (operation, axis, _), count in calls.items():
        total[operation, axis] += count
    return total


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_record_of_a_step_has_every_call(pool: Pool, layout: Layout) -> None:
    first, second = pool.run(record_step, layout, ranks=2)
    for one in (first, second):
        assert without_bytes(one.calls) == without_bytes(one.dispatched)
        assert one.calls
        assert not one.left_in
    shared = first.entered.keys() & second.entered.keys()
    for group in shared:
        assert first.entered[group] == second.entered[group]
    if layout.pipeline == 1:
        assert first.calls == second.calls
        return
    # Both ends know both channels, and a rank that waits for the other one shows it.
    assert len(shared) == 2
    sends = {key: n for key, n in first.calls.items() if key[0] == "send"}
    arrived = {key: n for key, n in second.calls.items() if key[0] == "recv"}
    assert sends == {("send", *key[1:]): n for key, n in arrived.items()}
    for one in (first, second):
        assert one.waits <= {"SEND", "RECEIVE"}
        assert "RECEIVE" in one.waits
        assert one.computes_in == {""}
