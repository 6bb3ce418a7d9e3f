"""Where in forward the gather of the next weights starts, read from the order of collectives in a world of 4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from evomesh.layers.block_softmax import PLAIN
from evomesh.parallel.build import build_grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.process_group import fake_world
from evomesh.parallel.traffic import CollectiveCall, TrafficLog, record_traffic
from evomesh.plan.trace import trace, weights_on_meta
from evomesh.train.stages import build_stages
from tests.dist.layouts import Layout, packs
from tests.support.covers import covers

pytestmark = pytest.mark.slow

GATHER, EXCHANGE = "all_gather", "all_to_all"
# Of the first layer, in forward: begin and end of wqkv, the exchanges of isp, then wo and the feed-forward network.
ORDER = {
    "off": [GATHER, "wqkv", "end", EXCHANGE, EXCHANGE, "wo", "w1"],
    "wqkv": [GATHER, "wqkv", GATHER, "end", EXCHANGE, EXCHANGE, "wo", "w1"],
    "attn": [GATHER, "wqkv", "end", GATHER, EXCHANGE, EXCHANGE, "wo", "w1"],
    "wo": [GATHER, "wqkv", "end", EXCHANGE, EXCHANGE, "wo", GATHER, "w1"],
    "w1": [GATHER, "wqkv", "end", EXCHANGE, EXCHANGE, "wo", "w1", GATHER],
    # norms and attention, then the feed-forward network; at its start the next norms and attention
    "module": [GATHER, GATHER, GATHER, "wqkv", "end", EXCHANGE, EXCHANGE, "wo", "w1", GATHER, GATHER],
}  # fmt: skip


def layout(start: str, **model: Any) -> Layout:
    weight: dict[str, Any] = {"overlap": start != "off"}
    if start == "module":
        weight["forward_overlap_per"] = "module"
    elif start != "off":
        weight["launch_allgather_before"] = start
    sizes = {"num_layers": 3, "dtype": "float32", **model}
    return Layout(tensor=2, mode="isp", weight=4, packs=1, model=sizes, parallel={"weight": weight})  # fmt: skip


def mark(module: nn.Module, traffic: TrafficLog, name: str, *, after: bool) -> None:
    """Add a mark to the log, ahead of the hooks that start gathers."""

    def add(*_: object) -> None:
        traffic.calls.append(CollectiveCall(name, "mark", 0))

    if after:
        module.register_forward_hook(add, prepend=True)
    else:
        module.register_forward_pre_hook(add, prepend=True)


@covers(
    "parallel.weight.launch_allgather_before", "parallel.weight.forward_overlap_per"
)
@pytest.mark.parametrize("start", ORDER)
def test_the_next_gather_starts_where_the_config_says(start: str) -> None:
    config = layout(start).config
    with fake_world(4, 0), weights_on_meta():
        grid = build_grid(config.parallel, 4, 0)
        device = torch.device("meta")
        stages = build_stages(config, grid, MODES["isp"], device)
        block = stages.models[0].layers["0"]
        batch = packs(0, range(1)).to(device)
        with record_traffic(grid) as traffic:
            wqkv = block.attention.wqkv
            mark(wqkv, traffic, "wqkv", after=False)
            mark(wqkv, traffic, "end", after=True)
            mark(block.attention.wo, traffic, "wo", after=False)
            mark(block.feed_forward, traffic, "w1", after=False)
            stages.schedule.train(batch, [1.0], PLAIN, lambda index, output: None)
    names = [call.operation for call in traffic.calls if call.axis != "tp" or call.operation == EXCHANGE]  # fmt: skip
    assert names[: len(ORDER[start])] == ORDER[start]


@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_no_gather_is_added(recompute: float) -> None:
    sizes = {}
    for start in ORDER:
        traffic = trace(layout(start, checkpoint=recompute).config, 4, 1).traffic
        sizes[start] = traffic.nbytes()[GATHER, "wp"]
    assert len(set(sizes.values())) == 1
