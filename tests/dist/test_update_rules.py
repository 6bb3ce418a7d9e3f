"""Three steps of every update rule in every kind of layout, against one process, in float64."""

from __future__ import annotations

import functools

import pytest
import torch

from evomesh.config.mup import MupConfig
from evomesh.config.parameter_groups import ParameterGroupConfig
from tests.dist.layouts import Layout, Trained, join, train
from tests.support.covers import covers
from tests.support.pool import Pool
from tests.support.tolerances import LAYOUT, assert_close

CUT = {"zero1": {"fsdp": True}}
# Five blocks: no number of ranks divides the matrices of one kind. The last two shard
# weights by FSDP2, over wp and over zero.
MUON = [
    Layout(model={"num_layers": 5}),
    Layout(zero1=2, family="internlm2"),
    Layout(ranks=2, zero1=1, family="internlm"),
    *(
        Layout(tensor=2, mode=mode, model={"num_layers": 5})
        for mode in ("mtp", "msp", "fsp", "isp")
    ),
    Layout(tensor=4, mode="fsp", family="qwen3"),
    Layout(tensor=2, mode="isp", weight=4, family="internlm2"),
    Layout(mode="isp", weight=2, family="qwen2"),
    Layout(pipeline=4, family="tied"),
    Layout(tensor=2, mode="msp", pipeline=2, chunks=2),
    Layout(pipeline=2, chunks=2, schedule="zbv", family="tied"),
    Layout(parallel=CUT, family="post_norm"),
    Layout(tensor=2, mode="mtp", parallel=CUT, model={"num_layers": 5}),
    Layout(pipeline=2, parallel=CUT, family="gemma"),
]
# The sign of an element that is zero but for rounding would differ: no biases.
LION = [
    Layout(),
    Layout(tensor=2, mode="msp", zero1=2),
    Layout(tensor=2, mode="isp", weight=2),
    Layout(pipeline=2, parallel=CUT),
]


# With float64 masters, and by FSDP2; the evaluated weights are compared.
AVERAGES = [
    Layout(),
    Layout(tensor=2, mode="mtp", zero1=2, family="internlm"),
    Layout(mode="isp", weight=2, family="qwen2"),
    Layout(pipeline=2, parallel=CUT),
    Layout(tensor=2, mode="msp", parallel=CUT, family="tied"),
]


# Matrices of one kind that Muon exchanges together, in two groups; and whole kinds.
GROUPS = (
    ParameterGroupConfig(pattern="layers.1.*", lr_scale=0.25, weight_decay=0.3),
    ParameterGroupConfig(pattern="*norm*", weight_decay=0.0),
    ParameterGroupConfig(pattern="embedding.*", lr_scale=0.5),
)
GROUPED = {
    "adamw": [
        Layout(tensor=2, mode="msp", zero1=2),
        Layout(tensor=2, mode="isp", weight=4),
        Layout(pipeline=2, parallel=CUT, family="tied"),
    ],
    "muon": [
        Layout(tensor=2, mode="mtp", model={"num_layers": 5}),
        Layout(tensor=2, mode="isp", weight=2),
        Layout(pipeline=2, parallel=CUT, family="tied"),
    ],
    "lion": [Layout(tensor=2, mode="fsp", zero1=1)],
    "schedule_free": [Layout(tensor=2, mode="mtp", pipeline=2)],
}


def with_rule(
    layout: Layout, rule: str, groups: tuple[ParameterGroupConfig, ...] = ()
) -> Layout:
    values = {**vars(layout), "adam": True, "rule": rule, "groups": groups}
    return Layout(**values)


# Widths and heads of four times the base, whose factors each stage and shard must have.
MUP = {"mup": MupConfig(base_hidden_size=8, base_head_dim=1)}
SCALED = {
    "adamw": [
        Layout(tensor=2, mode="fsp", zero1=2, model=MUP),
        Layout(tensor=2, mode="isp", weight=2, model=MUP),
        Layout(pipeline=2, parallel=CUT, family="tied", model=MUP),
    ],
    "muon": [Layout(tensor=2, mode="mtp", pipeline=2, family="qwen3", model=MUP)],
}


ALL = [
    *(with_rule(layout, "muon") for layout in MUON),
    *(with_rule(layout, "lion") for layout in LION),
    *(with_rule(layout, "schedule_free") for layout in AVERAGES),
    *(with_rule(layout, "ema") for layout in AVERAGES),
    *(
        with_rule(layout, rule, GROUPS)
        for rule, layouts in GROUPED.items()
        for layout in layouts
    ),
    *(
        with_rule(layout, rule)
        for rule, layouts in SCALED.items()
        for layout in layouts
    ),
]


@functools.cache
def one_process(
    family: str,
    rule: str,
    num_layers: int,
    groups: tuple[ParameterGroupConfig, ...],
    mup: MupConfig,
) -> Trained:
    layout = Layout(
        ranks=1,
        family=family,
        adam=True,
        rule=rule,
        groups=groups,
        model={"num_layers": num_layers, "mup": mup},
    )
    return join([train(0, layout)])


@covers("optimizer.type", "optimizer.ema.decay", "adam.groups")
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_trains_like_one_process(pool: Pool, layout: Layout) -> None:
    model = layout.config.model
    whole = one_process(
        layout.family, layout.rule, model.num_layers, layout.groups, model.mup
    )
    found = join(pool.run(train, layout, ranks=layout.ranks))
    losses = torch.tensor(found.losses, dtype=torch.float64)
    expected = torch.tensor(whole.losses, dtype=torch.float64)
    assert_close(losses, expected, LAYOUT, "losses and norms")
    for name, tensor in whole.final.items():
        assert_close(found.final[name], tensor, LAYOUT, f"{name} after three steps")
