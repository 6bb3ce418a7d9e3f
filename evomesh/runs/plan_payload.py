"""The figures of a page of ``evomesh plan`` as one JSON value: a step's streams, memory, groups, layouts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from evomesh.config.schema import Config
from evomesh.config.size import parameter_count
from evomesh.plan.device import Device
from evomesh.plan.group_traffic import groups_of, step_traffic
from evomesh.plan.memory_timeline import MemoryTimeline
from evomesh.plan.step_spans import (
    PlacedPart,
    RankSpans,
    StepPart,
    StepSpans,
    StreamSpan,
)
from evomesh.plan.step_time import StepTime
from evomesh.runs.payload import as_text
from evomesh.runs.read import Row

# Microseconds are seen; a tenth of one is not.
_DIGITS = 7


@dataclass(frozen=True)
class PlanFigures:
    """Figures of a page.

    Attributes:
        name: of the config.
        memory: of each rank of the pipeline over the step; empty for a custom model.
        layouts: rows of a search, the fastest first; None without one.
    """

    name: str
    config: Config
    gpus: int
    device: Device
    step: StepSpans
    memory: Sequence[MemoryTimeline]
    layouts: Sequence[LayoutRow] | None = None
    price: float | None = None


@dataclass(frozen=True)
class LayoutRow:
    """One layout of a search that fits."""

    layout: str
    peak: int
    time: StepTime


def plan_payload(figures: PlanFigures) -> Row:
    """Return what the page of a prediction shows."""
    config = figures.config
    gpus = figures.gpus
    step = figures.step
    device = figures.device
    groups = groups_of(config, gpus, device)
    layouts = None
    if figures.layouts is not None:
        layouts = [_layout_row(row) for row in figures.layouts]
    return {
        "written": time.time(),
        "name": figures.name,
        "gpus": gpus,
        "device": device.name,
        "per_node": device.gpus_per_node,
        "capacity": int(device.memory_gib * 2**30),
        "parameters": parameter_count(config.model),
        "tokens": step.time.tokens,
        "micro_batches": config.data.micro_num,
        "seconds": step.time.seconds,
        "speed": step.time.tokens_per_second,
        "price": figures.price,
        "parts": step.time.parts(),
        "ranks": [_rank(rank) for rank in step.ranks],
        "traffic": _traffic(figures),
        "groups": [asdict(axis) for axis in groups],
        "memory": [_memory(timeline) for timeline in figures.memory],
        "layouts": layouts,
    }


def _memory(timeline: MemoryTimeline) -> Row:
    """Return the bytes of a rank by kind, without kinds that it never has."""
    series = {}
    for kind, nbytes in zip(timeline.kinds, timeline.nbytes, strict=True):
        if any(nbytes):
            series[kind] = as_text(np.asarray(nbytes))
    parts = []
    for part in timeline.parts:
        parts.append([part.name, part.begin, part.end])
    return {
        "positions": list(timeline.positions),
        "bytes": series,
        "peak": timeline.peak,
        "phase": timeline.peak_part,
        "parts": parts,
        "micro_batches": timeline.micro_batches,
        "outside": timeline.outside,
    }


def _traffic(figures: PlanFigures) -> list[list[Row]]:
    """Return the traffic of each rank of the pipeline."""
    found = []
    step = figures.step
    for rank, traced in zip(step.ranks, step.timelines, strict=True):
        rows = step_traffic(
            traced,
            figures.config,
            figures.gpus,
            rank.rank,
            figures.device,
        )
        encoded = [asdict(row) for row in rows]
        found.append(encoded)
    return found


def _rank(rank: RankSpans) -> Row:
    return {
        "rank": rank.rank,
        "parts": [_part(part) for part in rank.parts],
        "placed": [_place(place) for place in rank.placed],
    }


def _place(place: PlacedPart) -> list[int | float | str]:
    """Return a placed part as a row: part, kind, stage, micro-batch, start, end, offset."""
    return [
        place.part,
        place.kind,
        place.stage,
        place.micro_batch,
        round(place.start, _DIGITS),
        round(place.end, _DIGITS),
        round(place.offset, _DIGITS),
    ]


def _part(part: StepPart) -> Row:
    """Return the spans of a part, by stream: starts, ends, and what was done as numbers of names."""
    names: dict[str, int] = {}
    of_stream: dict[str, list[StreamSpan]] = {}
    for span in part.spans:
        of_stream.setdefault(span.stream, []).append(span)
        names.setdefault(span.what, len(names))
    encoded = {}
    for stream, spans in of_stream.items():
        encoded[stream] = _spans(spans, names)
    return {
        "name": part.name,
        "names": list(names),
        "streams": encoded,
    }


def _spans(spans: Sequence[StreamSpan], names: Mapping[str, int]) -> Row:
    """Return spans of one stream; ``names`` numbers what is done."""
    starts = []
    ends = []
    whats = []
    for span in spans:
        starts.append(span.start)
        ends.append(span.end)
        whats.append(names[span.what])
    return {
        "starts": as_text(np.asarray(starts)),
        "ends": as_text(np.asarray(ends)),
        "whats": whats,
    }


def _layout_row(row: LayoutRow) -> Row:
    return {
        "layout": row.layout,
        "peak": row.peak,
        "seconds": row.time.seconds,
        "tokens": row.time.tokens,
        "speed": row.time.tokens_per_second,
        "parts": row.time.parts(),
    }
