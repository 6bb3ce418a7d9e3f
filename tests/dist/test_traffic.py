"""What each mode sends, by block and step: the table of docs/parallelism.md, and never more than InternEvo.

A is the bytes of one micro-batch's hidden states [T, D], W of one block's weights, Q
of one micro-batch's fused q, k, v.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from evomesh.layers.block_softmax import PLAIN
from evomesh.parallel.traffic import record_traffic
from tests.dist.layouts import Layout, T, packs, stages_of
from tests.support.pool import Pool

FLOAT64 = 8
# Of the layouts' model: 8 query heads and 2 x 4 key and value heads of 4.
D, Q_WIDTH = (32, 64)
A, Q = T * D * FLOAT64, T * Q_WIDTH * FLOAT64
W = FLOAT64 * (D * Q_WIDTH + D * D + 3 * D * 48 + 2 * D)

# mode -> (operation, axis) -> bytes of each call in forward and backward of one block
BLOCK = {
    "mtp": {("all_reduce", "tp"): [A] * 4},
    "msp": {("all_gather", "tp"): [A] * 4, ("reduce_scatter", "tp"): [A] * 4},
    "fsp": {("all_gather", "tp"): [A] * 6, ("reduce_scatter", "tp"): [A] * 4},
    # each rank exchanges its half of the sequence, or of the heads
    "isp": {("all_to_all", "tp"): [Q // 2, A // 2, A // 2, Q // 2]},
}
INTERNEVO = {  # calls of the same size in a Llama block: column layers 5, row layers 2, each on its own
    "mtp": {("all_reduce", "tp"): 2 + 5},
    "msp": {("all_gather", "tp"): 5 + 2, ("reduce_scatter", "tp"): 2 + 5},
    "fsp": {("all_gather", "tp"): 5 + 2 + 5, ("reduce_scatter", "tp"): 2 + 5},
    "isp": {("all_to_all", "tp"): 8},
}


def step_traffic(
    rank: int, layout: Layout
) -> tuple[Counter[tuple[str, str, int]], int]:
    """(operation, axis, bytes) -> calls of one step, and this rank's stage."""
    stages, grid = stages_of(layout)
    batch = packs(0, range(layout.packs))
    # Torch agrees on shapes once.
    stages.schedule.train(
        batch, [1.0] * layout.packs, PLAIN, lambda index, output: None
    )
    with record_traffic(grid) as traffic:
        stages.schedule.train(
            batch, [1.0] * layout.packs, PLAIN, lambda index, output: None
        )
    return Counter(
        (call.operation, call.axis, call.nbytes) for call in traffic.calls
    ), grid.pp.rank


def of_one_block(pool: Pool, **sizes: object) -> dict[tuple[str, str], list[int]]:
    """What one more layer adds."""
    totals = []
    for layers in (2, 3):
        layout = Layout(packs=1, model={"num_layers": layers}, **sizes)  # type: ignore[arg-type]
        totals.append(pool.run(step_traffic, layout, ranks=layout.ranks)[0][0])
    added = totals[1] - totals[0]
    found: dict[tuple[str, str], list[int]] = {}
    for (operation, axis, nbytes), calls in sorted(added.items()):
        found.setdefault((operation, axis), []).extend([nbytes] * calls)
    return found


@pytest.mark.parametrize("mode", BLOCK)
def test_a_block_sends_what_the_table_says(pool: Pool, mode: str) -> None:
    found = of_one_block(pool, tensor=2, mode=mode, ranks=2)
    assert found == {key: sorted(sizes) for key, sizes in BLOCK[mode].items()}
    for key, calls in INTERNEVO[mode].items():
        assert len(found[key]) <= calls


def test_weight_sharding_gathers_twice_and_reduces_once_a_block(pool: Pool) -> None:
    found = of_one_block(pool, mode="isp", weight=2, ranks=2)
    assert found == {("all_gather", "wp"): [W, W], ("reduce_scatter", "wp"): [W]}


def test_recompute_adds_the_forward_again(pool: Pool) -> None:
    plain = of_one_block(pool, tensor=2, mode="mtp", ranks=2)[("all_reduce", "tp")]
    layouts = [
        Layout(packs=1, tensor=2, ranks=2, model={"num_layers": n, "checkpoint": 1.0})
        for n in (2, 3)
    ]
    two, three = (pool.run(step_traffic, layout, ranks=2)[0][0] for layout in layouts)
    assert (three - two)[("all_reduce", "tp", A)] == len(
        plain
    ) + 1  # the block's last product is not needed again


@pytest.mark.parametrize(
    ("mode", "piece"), [("mtp", A // 2), ("msp", A // 2), ("isp", A // 2)]
)
def test_the_pipeline_sends_each_tensor_rank_s_piece_only(
    pool: Pool, mode: str, piece: int
) -> None:
    layout = Layout(tensor=2, mode=mode, pipeline=2)
    for traffic, stage in pool.run(step_traffic, layout):
        sends = {key: calls for key, calls in traffic.items() if key[0] == "send"}
        assert sends == {("send", "pp", piece): layout.packs}, stage


def test_overlap_moves_gathers_and_sends_no_more(pool: Pool) -> None:
    layouts = [
        Layout(mode="isp", weight=2, ranks=2, parallel={"weight": {"overlap": overlap}})
        for overlap in (False, True)
    ]
    off, on = (pool.run(step_traffic, layout, ranks=2)[0][0] for layout in layouts)
    assert off == on


def test_the_page_shows_the_measured_table() -> None:
    page = (Path(__file__).parents[2] / "docs/parallelism.md").read_text()
    for mode, calls in BLOCK.items():
        row = re.search(rf"^\| {mode} \|.*$", page, re.MULTILINE)
        assert row is not None
        for (operation, _), sizes in calls.items():
            assert f"{len(sizes)} {operation.replace('_', '-')}" in row[0], (
                f"{mode}: {operation}"
            )
