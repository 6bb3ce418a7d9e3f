"""Layouts composed of the parts of small models, against traces of the whole model and its ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evomesh.plan.device import load_device
from evomesh.plan.layout_choice import LayoutChoice, is_allowed, with_choice
from evomesh.plan.layout_predictor import PartsPredictor
from evomesh.plan.memory import trace_memory
from evomesh.plan.part_trace import (
    ShardShape,
    backward_of,
    forward_of,
    shape_period,
    trace_parts,
)
from evomesh.plan.stage_shape import StageShape
from evomesh.plan.step_time import predict_step

from .test_step_time import config

WORLD = 8
DEVICE = load_device("A100")
DEEP = config(num_layers=6, hidden_size=512)
PREDICTOR = PartsPredictor(DEEP, WORLD, DEVICE)


def layout(
    mode: str = "mtp",
    tensor: int = 1,
    weight: int = 1,
    pipeline: int = 1,
    chunks: int = 1,
    zero: int = 1,
    fsdp: bool = False,
    recompute: float = 0.0,
    micro_bsz: int = 1,
) -> LayoutChoice:
    """Return a layout of 32 packs a step, as the config has them."""
    data_ranks = WORLD // pipeline // tensor
    micro_num = 32 // data_ranks // micro_bsz
    return LayoutChoice(
        mode,  # type: ignore[arg-type]
        tensor,
        weight,
        pipeline,
        chunks,
        zero,
        fsdp,
        recompute,
        micro_bsz,
        micro_num,
    )


# Of each kind at least one: modes, an axis over all ranks and a part of them, more than
# four ranks to shard weights over, stages with one and several chunks, recomputing of
# some and all layers, other micro-batches than the config's.
LAYOUTS = [
    layout(zero=8),
    layout("mtp", tensor=2, zero=4, recompute=0.5),
    layout("msp", tensor=4, pipeline=2),
    layout("fsp", tensor=2, micro_bsz=2, recompute=1.0),
    layout(zero=8, fsdp=True, micro_bsz=2, recompute=1.0),
    layout("isp", tensor=2, weight=4, zero=2),
    layout("isp", weight=2, pipeline=2, recompute=0.5),
    layout(pipeline=2, zero=2, chunks=2),
    layout("mtp", tensor=2, pipeline=2, zero=2, fsdp=True, micro_bsz=2),
]


@pytest.mark.parametrize("choice", LAYOUTS, ids=str)
def test_a_composed_layout_is_like_the_traced_one(choice: LayoutChoice) -> None:
    """The time of a step within 1.5 %, the peak of every rank within 3 %; held tensors to the byte."""
    assert is_allowed(DEEP, choice, WORLD)
    changed = with_choice(DEEP, choice)
    whole = predict_step(changed, WORLD, DEVICE)
    composed = PREDICTOR.step_time(choice)
    assert composed.seconds == pytest.approx(whole.seconds, rel=0.015)
    assert composed.tokens == whole.tokens
    least = PREDICTOR.least_seconds(choice)
    assert least <= composed.seconds * (1 + 1e-9)
    assert least >= 0.8 * composed.seconds

    peaks = []
    for rank in range(0, WORLD, WORLD // choice.pipeline):
        traced = trace_memory(changed, WORLD, rank)
        peaks.append(traced.peak())
    largest = max(peaks, key=lambda peak: peak.total)
    found = PREDICTOR.peak(choice)
    assert found.total == pytest.approx(largest.total, rel=0.03)
    for kind in ("weights", "gradients", "masters", "moments"):
        assert found.kinds[kind] == largest.kinds[kind]
    assert found.outside["NCCL"] == largest.outside["NCCL"]


def test_a_zero_axis_larger_than_its_ranks_is_that_of_all() -> None:
    """As in a run, which warns: 4 ranks hold the same shard of the weights."""
    for choice in (layout(tensor=2, zero=8), layout(pipeline=2, zero=8, fsdp=True)):
        used = replace(choice, zero=4)
        assert PREDICTOR.peak(choice) == PREDICTOR.peak(used)
        assert PREDICTOR.step_time(choice).seconds == PREDICTOR.step_time(used).seconds


def test_a_shape_is_traced_once() -> None:
    predictor = PartsPredictor(DEEP, WORLD, DEVICE)
    choices = [
        layout(zero=zero, recompute=recompute, pipeline=pipeline)
        for zero in (1, 2, 4)
        for recompute in (0.0, 0.25, 0.5)
        for pipeline in (1, 2)
        if zero * pipeline <= WORLD
    ]
    for choice in choices:
        predictor.peak(choice)
        predictor.least_seconds(choice)
    # With and without recomputing, for the whole model and for what a stage adds. The
    # stages of a pipeline of two have an end of the model each.
    assert predictor.library.num_traces <= 4


def test_a_stage_without_layers_in_the_middle_shares_the_trace_of_deeper_ones() -> None:
    """Three layers of sharded weights are two leading ones and a last one, each as in a trace of three."""
    library = PartsPredictor(DEEP, WORLD, DEVICE).library
    shape = ShardShape("mtp", 1, 2, 1, recompute=False, depth=3, is_middle=False)
    deep = library.makeup(shape, StageShape(6, 0, is_first=True, is_last=True))
    traces = library.num_traces
    short = library.makeup(shape, StageShape(3, 0, is_first=True, is_last=True))
    assert library.num_traces == traces
    assert len(deep.layers) == 6
    traced = trace_parts(DEEP, shape)
    for number, (source, layer) in enumerate(short.layers):
        for name_of in (forward_of, backward_of):
            of_stage = source.nbytes[name_of(layer)]
            assert of_stage == traced.nbytes[name_of(number)]


def test_layers_of_several_kinds_repeat() -> None:
    assert shape_period(DEEP) == 1
    kinds = ("sliding_attention", "sliding_attention", "full_attention")
    types = (*kinds, *kinds, "sliding_attention")
    mixed = config(num_layers=7, sliding_window=512, layer_types=types)
    assert shape_period(mixed) == 3
