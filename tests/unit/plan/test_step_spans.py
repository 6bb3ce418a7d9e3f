"""Streams of a step, span by span, against the times and the traffic that are computed without them."""

from __future__ import annotations

import itertools

import pytest

from evomesh.config.layout import axis_sizes
from evomesh.config.schema import Config
from evomesh.parallel.build import axis_members
from evomesh.plan.device import load_device
from evomesh.plan.group_traffic import groups_of, step_traffic
from evomesh.plan.simulate import kernel_seconds
from evomesh.plan.step_spans import (
    END,
    MICRO_BATCH,
    OPTIMIZER,
    SEND,
    RankSpans,
    StepSpans,
    predict_spans,
)
from evomesh.plan.step_time import FIRST, hop_seconds, predict_step
from evomesh.plan.timeline import COMPUTE, Kernel
from evomesh.plan.trace import trace
from tests.unit.plan.test_step_time import config

DEVICE = load_device("H100")
SHARDED = {"zero1": {"size": 2}, "tensor": {"size": 2, "mode": "msp"}}
PIPELINE = {"pipeline": {"size": 2}, "zero1": {"size": 2}}


@pytest.fixture(scope="module")
def sharded() -> tuple[Config, StepSpans]:
    layout = config(SHARDED)
    return layout, predict_spans(layout, 4, DEVICE)


@pytest.fixture(scope="module")
def pipelined() -> tuple[Config, StepSpans]:
    layout = config(PIPELINE)
    return layout, predict_spans(layout, 4, DEVICE)


def seconds_of(rank: RankSpans, stream: str) -> float:
    """Return how long a stream is busy in all whole parts of a step."""
    total = 0.0
    for place in rank.placed:
        for span in rank.parts[place.part].spans:
            inside = place.offset <= span.start < place.offset + place.end - place.start
            if span.stream == stream and inside:
                total += span.end - span.start
    return total


def test_a_step_without_pipeline_is_its_micro_batches_and_the_update(
    sharded: tuple[Config, StepSpans],
) -> None:
    layout, spans = sharded
    time = predict_step(layout, 4, DEVICE)
    assert spans.time.seconds == pytest.approx(time.seconds, rel=0.01)
    (rank,) = spans.ranks
    kinds = [place.kind for place in rank.placed]
    assert kinds == [MICRO_BATCH] * 4 + [END]
    # One begins where the one before ends, and the last ends with the step.
    ends = [0.0] + [place.end for place in rank.placed]
    assert [place.start for place in rank.placed] == pytest.approx(ends[:-1])
    assert ends[-1] == pytest.approx(spans.time.seconds)
    micro_batch, last = rank.parts
    assert micro_batch.spans[0].start == 0
    # Sums, the update, then the gathers.
    (update,) = [span for span in last.spans if span.what == OPTIMIZER]
    for span in last.spans:
        is_gather = (
            span.what.startswith("all_gather")
            and span.start > micro_batch.spans[-1].end
        )
        assert not is_gather or span.start >= update.end
    end = max(span.end for span in last.spans)
    assert end == pytest.approx(ends[-1] - ends[3])


def test_spans_of_a_stream_are_its_kernels_without_overlap(
    sharded: tuple[Config, StepSpans],
) -> None:
    _, spans = sharded
    part = spans.ranks[0].parts[0]
    computed = 0.0
    for event in spans.timelines[0].part(FIRST):
        if isinstance(event, Kernel) and event.stream == COMPUTE:
            computed += kernel_seconds(event, DEVICE, "bfloat16")
    streams: dict[str, list[tuple[float, float]]] = {}
    for span in part.spans:
        streams.setdefault(span.stream, []).append((span.start, span.end))
    busy = [end - start for start, end in streams[COMPUTE]]
    assert sum(busy) == pytest.approx(computed)
    assert "all_gather tp" in streams
    for times in streams.values():
        for before, after in itertools.pairwise(times):
            assert before[1] <= after[0] + 1e-12


def test_ranks_of_a_pipeline_do_each_action_once_and_wait_for_each_other(
    pipelined: tuple[Config, StepSpans],
) -> None:
    layout, spans = pipelined
    time = predict_step(layout, 4, DEVICE)
    assert spans.time.seconds == pytest.approx(time.seconds, rel=0.01)
    assert [rank.rank for rank in spans.ranks] == [0, 2]
    begin = {}
    end = {}
    for stage, rank in enumerate(spans.ranks):
        assert rank.placed[-1].kind == END
        for place in rank.placed[:-1]:
            assert place.stage == stage
            key = place.kind, stage, place.micro_batch
            assert key not in begin
            begin[key], end[key] = place.start, place.end
    assert len(begin) == 2 * 2 * 4
    hop = hop_seconds(layout, 4, DEVICE)
    for index in range(4):
        assert begin["F", 1, index] >= end["F", 0, index] + hop - 1e-12
        assert begin["B", 0, index] >= end["B", 1, index] + hop - 1e-12
    longest = max(rank.placed[-1].end for rank in spans.ranks)
    assert longest == pytest.approx(spans.time.seconds)
    # Only the first stage sends hidden states on, and only the last one gradients back.
    for rank, kind in zip(spans.ranks, ("F 0", "B 1"), strict=True):
        sending = {
            part.name for part in rank.parts for span in part.spans if span.what == SEND
        }
        assert sending == {kind}


@pytest.mark.parametrize("parallel", [SHARDED, PIPELINE])
def test_traffic_of_a_step_is_that_of_its_trace(
    parallel: dict[str, dict[str, object]],
) -> None:
    layout = config(parallel)
    spans = predict_spans(layout, 4, DEVICE)
    traced = trace(layout, 4, 0).traffic
    rows = step_traffic(spans.timelines[0], layout, 4, 0, DEVICE)
    counts = {(row.operation, row.axis): row.calls for row in rows}
    sizes = {(row.operation, row.axis): row.nbytes for row in rows}
    assert counts == traced.count()
    assert sizes == traced.nbytes()
    assert all(row.seconds > 0 for row in rows)


def test_groups_are_the_sets_of_ranks_of_each_axis() -> None:
    layout = config(
        {
            "pipeline": {"size": 2},
            "tensor": {"size": 2, "mode": "msp"},
            "zero1": {"size": 4},
        }
    )
    world = 32
    found = {axis.name: axis for axis in groups_of(layout, world, DEVICE)}
    sizes = axis_sizes(layout.parallel, world)
    of_axis: dict[str, set[tuple[int, ...]]] = {}
    for rank in range(world):
        for name, members in axis_members(sizes, rank).items():
            of_axis.setdefault(name, set()).add(tuple(members))
    for name, groups in of_axis.items():
        size = len(next(iter(groups)))
        if size == 1:
            assert name not in found
            continue
        axis = found[name]
        assert (axis.size, axis.count) == (size, len(groups))
        first = tuple(range(0, axis.size * axis.distance, axis.distance))
        assert first in groups
        assert axis.nodes == len({rank // 8 for rank in first})
