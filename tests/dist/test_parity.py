"""The config in small, in its layout and in one process: equal, or the first module that differs is named.

``benchmarks/parity_layouts.py`` does the same for every layout of ``test_matrix``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from tests.dist.layouts import Layout
from tests.dist.parity_jobs import (
    compare_broken,
    compare_halved,
    compare_small,
    compare_stale,
    skip_gradient_sum,
    skip_reduction,
)
from tests.support.pool import Pool

MTP = Layout(tensor=2, mode="mtp", family="llama")
MSP = Layout(tensor=2, mode="msp", family="llama")
ISP = Layout(tensor=2, mode="isp", weight=4, family="qwen3")
PIPELINE = Layout(tensor=2, mode="mtp", pipeline=2, chunks=2, family="gemma2")
FSDP = Layout(parallel={"zero1": {"fsdp": True}}, family="internlm2")


@pytest.mark.parametrize("layout", [MTP, ISP, PIPELINE, FSDP], ids=str)
def test_a_layout_trains_like_one_process(pool: Pool, layout: Layout) -> None:
    parts = pool.run(compare_small, layout, "float64")
    for found in parts:
        assert found["is_equal"], found["text"]
        # Activations in both directions, gradients and weights of both steps.
        assert found["compared"] > 1000 and found["largest"] < 1e-13
    assert len({found["text"] for found in parts}) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layout_in_the_dtype_of_a_config(pool: Pool, dtype: str) -> None:
    found = pool.run(compare_small, MSP, dtype)[0]
    assert found["is_equal"] and found["largest"] > 0, found["text"]


@pytest.mark.parametrize(
    ("layout", "name", "fault", "kind", "named"),
    [
        (MTP, "layers.1.feed_forward.w2", skip_reduction, "output", None),
        (MTP, "layers.0.attention.wo", skip_reduction, "output", None),
        (
            MTP,
            "layers.1.feed_forward.w1",
            skip_reduction,
            "input gradient",
            "layers.1.feed_forward",
        ),
        (
            MSP,
            "layers.1.ffn_norm",
            skip_gradient_sum,
            "parameter gradient",
            "layers.1.ffn_norm.weight",
        ),
        (PIPELINE, "layers.3.feed_forward.w2", skip_reduction, "output", None),
    ],
)
def test_a_broken_reduction_is_named(
    pool: Pool,
    layout: Layout,
    name: str,
    fault: Callable[[nn.Module], None],
    kind: str,
    named: str | None,
) -> None:
    for found in pool.run(compare_broken, layout, name, fault):
        first = found["first"]
        assert not found["is_equal"] and first is not None
        assert (first["name"], first["kind"]) == (named or name, kind), found["text"]
        assert first["step"] == 0 and first["distance"] > 0.01
        assert (named or name) in found["text"]


@pytest.mark.parametrize(
    ("layout", "module", "collective", "name", "kind"),
    [
        (MTP, "layers.block_softmax", "all_reduce_no_grad", "head", "token losses"),
        (ISP, "layers.attention", "all_to_all", "layers.0.attention.wo", "input"),
        (PIPELINE, "pipeline.stage_module", "gather_from_axis", "layers.1", "input"),
        (MTP, "optim.clip", "all_reduce_no_grad", "the model", "gradient norm"),
    ],
)
def test_a_broken_collective_is_named_by_what_it_reaches_first(
    pool: Pool, layout: Layout, module: str, collective: str, name: str, kind: str
) -> None:
    found = pool.run(compare_halved, layout, f"evomesh.{module}", collective)[0]
    first = found["first"]
    assert first is not None and first["step"] == 0
    assert (first["name"], first["kind"]) == (name, kind), found["text"]


def test_weights_that_are_not_gathered_are_named(pool: Pool) -> None:
    found = pool.run(compare_stale, Layout(family="llama"))[0]
    first = found["first"]
    assert first["kind"] == "weight" and first["step"] == 0, found["text"]
