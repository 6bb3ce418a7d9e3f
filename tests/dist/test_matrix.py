"""Every layout trains like one process: losses, every gradient, and the parameters after three steps, in float64."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.dist.layouts import FAMILIES, Layout, Trained, join, train
from tests.support.pool import Pool
from tests.support.tolerances import LAYOUT, assert_close, assert_equal_bits

MODES = [
    Layout(tensor=tensor, mode=mode, ranks=ranks, family=family)
    for mode in ("mtp", "msp", "fsp", "isp")
    for tensor, ranks in ((2, 2), (2, 4), (4, 4))
    for family in FAMILIES
]
VARIANTS = [
    Layout(),
    Layout(ranks=2, family="internlm"),
    *(Layout(tensor=4, mode=mode, model={"embed_split_hidden": True}) for mode in ("mtp", "fsp")),
    *(Layout(tensor=2, mode=mode, model={"parallel_output": False}) for mode in ("mtp", "msp")),
    *(Layout(tensor=4, mode=mode, smoothing=0.1) for mode in ("mtp", "fsp")),
    *(Layout(tensor=2, mode=mode, model={"checkpoint": 0.5}) for mode in ("mtp", "msp", "fsp", "isp")),
    Layout(tensor=2, mode="msp", model={"use_swiglu": False}),
    Layout(tensor=2, mode="fsp", model={"residual_in_fp32": True}),
]


PIPELINES = [
    *(Layout(pipeline=pp, ranks=ranks, family=family) for pp, ranks in ((2, 2), (2, 4), (4, 4)) for family in FAMILIES),
    Layout(pipeline=4, packs=2),
    Layout(pipeline=4, packs=1),
    Layout(pipeline=2, ranks=2, model={"num_layers": 5}),
    Layout(pipeline=4, model={"num_layers": 7}, parallel={"pipeline": {"balance": True}}),
    Layout(pipeline=2, ranks=2, chunks=2),
    Layout(pipeline=2, chunks=2, packs=8),
    Layout(pipeline=2, chunks=2, family="internlm", model={"num_layers": 7}),
    Layout(pipeline=4, chunks=2, model={"num_layers": 8}),
    Layout(pipeline=2, ranks=2, chunks=2, schedule="zbv"),
    Layout(pipeline=4, chunks=2, schedule="zbv", model={"num_layers": 8}, family="internlm2"),
    *(Layout(tensor=2, mode=mode, pipeline=2, family=family) for mode in ("mtp", "msp", "fsp", "isp")
      for family in ("internlm", "internlm2")),
    *(Layout(tensor=2, mode=mode, pipeline=2, chunks=2) for mode in ("mtp", "msp", "fsp", "isp")),
    *(Layout(tensor=2, mode=mode, pipeline=2, chunks=2, schedule="zbv") for mode in ("mtp", "msp")),
    Layout(tensor=2, mode="mtp", pipeline=2, model={"checkpoint": 1.0}),
]
WEIGHTS = [
    Layout(mode="isp", weight=2, ranks=2),
    Layout(mode="isp", weight=4, family="internlm"),
    Layout(mode="isp", weight=2, zero1=2, family="internlm2"),
    Layout(tensor=2, mode="isp", weight=2, family="internlm"),
    Layout(tensor=2, mode="isp", weight=4),
    Layout(tensor=4, mode="isp", weight=2, family="internlm2"),
    Layout(tensor=4, mode="isp", weight=4, family="post_norm"),
    Layout(tensor=2, mode="isp", weight=4, parallel={"weight": {"overlap": True}}),
    Layout(tensor=2, mode="isp", weight=4, model={"checkpoint": 0.5}),
    Layout(tensor=2, mode="isp", weight=2, pipeline=2),
    Layout(mode="isp", weight=2, pipeline=2, chunks=2),
    Layout(tensor=2, mode="isp", weight=2, pipeline=2, chunks=2, model={"checkpoint": 1.0}),
]


@functools.cache
def reference(family: str, smoothing: float, packs: int, model: tuple[tuple[str, Any], ...]) -> Trained:
    return join([train(0, Layout(ranks=1, family=family, smoothing=smoothing, packs=packs, model=dict(model)))])


def one_process(layout: Layout) -> Trained:
    """The same training without any layout: of the varied keys only those that change the model itself remain."""
    model = tuple((key, value) for key, value in layout.model.items() if key in ("use_swiglu", "num_layers"))
    return reference(layout.family, layout.smoothing, layout.packs, model)


@pytest.mark.parametrize("layout", MODES + VARIANTS + PIPELINES + WEIGHTS, ids=str)
def test_trains_like_one_process(pool: Pool, layout: Layout) -> None:
    whole, found = one_process(layout), join(pool.run(train, layout, ranks=layout.ranks))
    for name, tensor in whole.initial.items():
        assert_equal_bits(found.initial[name], tensor, f"initial {name}")
    for step, (a, b) in enumerate(zip(found.losses, whole.losses, strict=True)):
        assert_close(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), LAYOUT, f"loss {step}")
    for name, tensor in whole.gradients.items():
        assert_close(found.gradients[name], tensor, LAYOUT, f"gradient of {name}")
    for name, tensor in whole.final.items():
        assert_close(found.final[name], tensor, LAYOUT, f"{name} after three steps")


def test_the_run_can_tell_layouts_apart() -> None:
    """What the matrix compares does move: another smoothing gives another loss, and three steps change the weights."""
    layout = Layout(ranks=1)
    plain, smooth = one_process(layout), one_process(replace(layout, smoothing=0.1))
    assert plain.losses[0] != smooth.losses[0]
    assert plain.losses[0] != plain.losses[2]
    assert all(not torch.equal(plain.initial[name], tensor) for name, tensor in plain.final.items())
