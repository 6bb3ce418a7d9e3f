"""What a step sends on a device, counted on the meta device in a fake world."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from evomesh.config.schema import Config, ModelConfig, ParallelConfig, ZeroConfig
from evomesh.optim import buckets
from evomesh.plan.trace import StepTrace, trace

MODEL: dict[str, Any] = dict(
    model_type="LLAMA2",
    dtype="bfloat16",
    num_layers=12,
    hidden_size=32,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    mlp_ratio=2.0,
    multiple_of=8,
    vocab_size=64,
    no_bias=True,
)


def traced(
    parallel: dict[str, Any],
    zero: dict[str, Any] | None = None,
    world_size: int = 8,
    **model: Any,
) -> StepTrace:
    config = Config(
        model=ModelConfig(**MODEL | model),
        parallel=ParallelConfig.model_validate(parallel),
        hybrid_zero_optimizer=ZeroConfig(**zero or {}),
    )
    return trace(config, world_size)


@pytest.fixture
def small_gathers(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Gathers of at most four blocks' weights."""
    elements = 4 * 32 * (32 + 2 * 16 + 32 + 3 * 64)
    monkeypatch.setattr(buckets, "DEVICE_GATHER_ELEMENTS", elements)
    yield elements


def test_updated_parameters_are_gathered_together_by_default(
    small_gathers: int,
) -> None:
    found = traced({"zero1": {"size": 8}})
    gathers = [c for c in found.traffic.calls if c.operation == "all_gather"]
    matrices = 12 * 5 + 2
    elements = found.parameters // 2 - (12 * 2 + 1) * 32  # norms are whole everywhere
    assert sum(call.nbytes for call in gathers) == 2 * elements
    assert len(gathers) <= 2 * elements / small_gathers + 1 < matrices / 8
    assert max(call.nbytes for call in gathers) <= 2 * small_gathers


@pytest.mark.parametrize("overlap", [False, True])
def test_sums_over_replicas_overlap_with_backward(overlap: bool) -> None:
    found = traced(
        {"zero1": {"size": 4}},
        {"overlap_sync_grad": overlap, "reduce_bucket_size": 20000},
    )
    sums = [
        (call.operation, call.axis)
        for call in found.traffic.calls
        if call.operation in ("reduce_scatter", "all_reduce")
    ]
    in_backward = [
        (call.operation, call.axis)
        for call in found.traffic.calls[: found.passes]
        if call.operation in ("reduce_scatter", "all_reduce")
    ]
    assert sums.count(("reduce_scatter", "zero")) > 3
    assert sums.count(("all_reduce", "replica")) > 3
    assert in_backward == (sums if overlap else [])
    # Each reduce-scatter is followed by the sum of its result over the replicas.
    for index, kind in enumerate(sums):
        if kind == ("reduce_scatter", "zero"):
            assert sums[index + 1] == ("all_reduce", "replica")


@pytest.mark.parametrize("norm_head", [False, True])
@pytest.mark.parametrize("fp32_norms", [False, True])
def test_fsdp_gathers_blocks_twice_and_the_ends_once(
    fp32_norms: bool, norm_head: bool
) -> None:
    model = {"use_fp32_norm": fp32_norms, "norm_head": norm_head}
    if norm_head:
        model |= {"model_type": "BAICHUAN2"}
    found = traced({"zero1": {"fsdp": True}}, world_size=4, **model)
    in_passes = found.traffic.calls[: found.passes]
    calls = [call.operation for call in in_passes if call.axis == "dp"]
    # The first gather in backward is of the last block, which is not freed before.
    assert calls.count("all_gather") == 2 * 12 + 2 + norm_head
    assert calls.count("reduce_scatter") == 12 + 2


@pytest.mark.slow
@pytest.mark.parametrize("fp32_norms", [False, True])
def test_isp_gathers_no_norm_alone(fp32_norms: bool) -> None:
    parallel = {"tensor": {"size": 2, "mode": "isp"}, "weight": {"size": 4}}
    found = traced(parallel, world_size=4, use_fp32_norm=fp32_norms)
    in_passes = found.traffic.calls[: found.passes]
    calls = [call.operation for call in in_passes if call.axis == "wp"]
    assert calls.count("all_gather") == 2 * 12
    assert calls.count("reduce_scatter") == 12
    # All norms are summed with the last one.
    after = [call.operation for call in found.traffic.calls[found.passes :]]
    few = traced(parallel, world_size=4, use_fp32_norm=fp32_norms, num_layers=6)
    assert after == [call.operation for call in few.traffic.calls[few.passes :]]
