"""Timelines of real steps against arithmetic, and predicted speeds against published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from benchmarks.published_steps import PublishedRow, published_rows
from evomesh.config.data import DataConfig
from evomesh.config.schema import Config, ModelConfig, ParallelConfig
from evomesh.plan.device import load_device
from evomesh.plan.step_time import (
    FIRST,
    UPDATE,
    RankTimeline,
    axis_placements,
    predict_step,
    time_rank,
    trace_timeline,
)
from evomesh.plan.timeline import (
    COMPUTE,
    Kernel,
    KernelKind,
    Mark,
    RecordedStreams,
    Timeline,
    Transfer,
    Wait,
)

T, D, F, V, L = 2048, 256, 704, 4000, 4
LINEAR = L * (4 * D * D + 3 * D * F)
HEAD = V * D
DEVICE = load_device("A100")


def config(parallel: dict[str, Any] | None = None, **model: Any) -> Config:
    shape: dict[str, Any] = dict(
        model_type="LLAMA2",
        dtype="bfloat16",
        num_layers=L,
        hidden_size=D,
        num_attention_heads=4,
        vocab_size=V,
        mlp_ratio=F / D,
        multiple_of=1,
        no_bias=True,
    )
    return Config(
        model=ModelConfig(**shape | model),
        data=DataConfig(seq_len=T, micro_bsz=1, micro_num=4),
        parallel=ParallelConfig.model_validate(parallel or {}),
    )


def product_flops(traced: RankTimeline) -> int:
    return sum(
        event.flops
        for event in traced.part(FIRST)
        if isinstance(event, Kernel) and event.kind is KernelKind.MATRIX
    )


@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_products_are_those_of_forward_and_backward(recompute: float) -> None:
    """Two operations for each weight and token, in forward, and for the gradients of inputs and of weights."""
    traced = trace_timeline(config(checkpoint=recompute), 1, 0)
    expected = 2 * (LINEAR + HEAD) * T * 3
    if recompute:
        # All but the last product of a block, whose result no gradient needs.
        expected += 2 * (LINEAR - L * D * F) * T
    assert product_flops(traced) == pytest.approx(expected, rel=1e-6)


def test_tensor_ranks_divide_the_products_and_wait_for_their_sums() -> None:
    layout = config({"tensor": {"size": 2, "mode": "mtp"}})
    traced = trace_timeline(layout, 2, 0)
    whole = 6 * (LINEAR + HEAD) * T
    assert product_flops(traced) == pytest.approx(whole / 2, rel=1e-3)
    seconds = time_rank(traced, layout, 2, 0, DEVICE)
    sums = seconds.busy["all_reduce tp"]
    # Nothing can be computed before a sum has arrived, but weights' gradients in backward.
    assert 0.8 * sums < seconds.exposed < sums


def test_weights_of_fsdp_are_gathered_while_the_layer_before_computes() -> None:
    layout = config({"zero1": {"fsdp": True}}, num_layers=8, hidden_size=1024)
    traced = trace_timeline(layout, 8, 0)
    seconds = time_rank(traced, layout, 8, 0, DEVICE)
    gathers = seconds.busy["all_gather dp"]
    # The first layer's gather has nothing to hide behind.
    assert 0 < seconds.exposed < gathers / 3
    # On a network slow enough, no order hides them.
    links = DEVICE.links.model_copy(update={"node": 0.1})
    slow = DEVICE.model_copy(update={"links": links})
    waiting = time_rank(traced, layout, 8, 0, slow)
    assert waiting.exposed > 0.8 * waiting.busy["all_gather dp"]


def attention_flops(traced: RankTimeline) -> list[int]:
    kernels = [event for event in traced.part(FIRST) if isinstance(event, Kernel)]
    return [event.flops for event in kernels if event.kind is KernelKind.ATTENTION]


def test_attention_counts_where_torch_does_not_count_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch 2.11 has no formula for attention by segments, and later versions have one."""
    segments, longest = 4, T // 4
    one = config(num_layers=1)
    data = one.data.model_copy(update={"seq_len": longest, "micro_bsz": segments})
    one = one.model_copy(update={"data": data})
    counted = attention_flops(trace_timeline(one, 1, 0))
    assert counted == [products * 2 * D * segments * longest**2 for products in (2, 5)]
    operators = torch.ops.torch_attn
    for operator in (operators._varlen_attn, operators._varlen_attn_backward):
        monkeypatch.delitem(flop_registry, operator, raising=False)
    assert attention_flops(trace_timeline(one, 1, 0)) == counted


@pytest.mark.slow
def test_gradients_are_reduced_during_backward_where_the_config_says_so() -> None:
    layout = config(num_layers=8)
    zero = layout.hybrid_zero_optimizer
    times = []
    for overlap in (False, True):
        section = zero.model_copy(
            update={"overlap_sync_grad": overlap, "reduce_bucket_size": D * F}
        )
        changed = layout.model_copy(update={"hybrid_zero_optimizer": section})
        traced = trace_timeline(changed, 8, 0)
        in_update = [
            event
            for event in traced.part(UPDATE)
            if isinstance(event, Transfer) and event.call.operation == "reduce_scatter"
        ]
        times.append((len(in_update), predict_step(changed, 8, DEVICE).update))
    (late, late_seconds), (early, early_seconds) = times
    assert late > early
    assert early_seconds < late_seconds


def test_what_streams_wait_for_is_written_down() -> None:
    timeline = Timeline()
    device = RecordedStreams(timeline).interface()
    side = device.Stream()
    side.wait_stream(device.current_stream())
    with device.stream(side):
        event = device.Event().record()
    device.current_stream().wait_event(event)
    assert timeline.events == [
        *(Mark(COMPUTE, 1), Wait("stream 1", 1)),
        *(Mark("stream 1", 2), Wait(COMPUTE, 2)),
    ]


def test_axes_are_placed_on_nodes_of_adjacent_ranks() -> None:
    parallel = {"tensor": {"size": 4, "mode": "mtp"}, "zero1": {"size": 2}}
    places = axis_placements(config(parallel), 32, 0, DEVICE)
    assert (places["tp"].ranks, places["tp"].nodes) == (4, 1)
    assert (places["dp"].ranks, places["dp"].nodes) == (8, 4)
    assert (places["zero"].ranks, places["zero"].nodes) == (2, 1)
    assert (places["replica"].ranks, places["replica"].nodes) == (4, 4)


@pytest.mark.parametrize(
    ("kind", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zbv", 2)]
)
def test_schedules_differ_by_their_bubbles(kind: str, chunks: int) -> None:
    parallel = {"pipeline": {"size": 2, "schedule": kind}}
    layout = config(parallel, num_chunks=chunks, hidden_size=1024)
    time = predict_step(layout, 2, DEVICE)
    # Two stages, four micro-batches: 1F1B waits for the lighter stage once, the second
    # has the head.
    share = time.bubble / (time.seconds - time.update)
    bound = {"1f1b": (0.12, 0.20), "interleaved": (0.03, 0.12), "zbv": (0.0, 0.12)}
    low, high = bound[kind]
    assert low <= share <= high


CALIBRATED = [row for row in published_rows() if row.is_calibrated]


@pytest.mark.slow
@pytest.mark.parametrize("row", CALIBRATED, ids=lambda row: f"{row.source} {row.name}")
def test_calibrated_rows_are_met(row: PublishedRow) -> None:
    predicted = row.predict()
    assert predicted == pytest.approx(row.published, rel=0.03)
