"""Every layout trains like one process: losses, every gradient, and the parameters after three steps, in float64."""

from __future__ import annotations

import functools
from dataclasses import replace

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


@functools.cache
def reference(family: str, smoothing: float, extra: tuple[tuple[str, object], ...]) -> Trained:
    model = {key: value for key, value in extra if key in ("use_swiglu",)}
    return join([train(0, Layout(ranks=1, family=family, smoothing=smoothing, model=model))])


def one_process(layout: Layout) -> Trained:
    return reference(layout.family, layout.smoothing, tuple(layout.model.items()))


@pytest.mark.parametrize("layout", MODES + VARIANTS, ids=str)
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
