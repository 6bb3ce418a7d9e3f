"""Spans of a step: the streams of the ranks of a pipeline over time, as ``step_time`` simulates them.

A micro-batch is simulated once, and its parts are placed where the schedule has them:

    parts of a rank     F 0: matrix products 0 to 2 ms, all_gather tp 1 to 3 ms, ...    B 0: ...    last: ...
    placed parts        F 0 of micro-batch 0 at 0 ms, F 0 of micro-batch 1 at 9 ms, B 0 of micro-batch 0 at 40 ms, ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from evomesh.config.schema import Config
from evomesh.plan.device import Device
from evomesh.plan.pipeline_time import TimedActions, last_end
from evomesh.plan.simulate import StreamTimes, simulate
from evomesh.plan.step_time import (
    FIRST,
    LAST,
    UPDATE,
    RankSeconds,
    RankTimeline,
    StepTime,
    axis_placements,
    combine,
    first_pipeline,
    hop_seconds,
    schedule_ranks,
    time_rank,
    trace_timeline,
    traced_device,
)
from evomesh.plan.timeline import COMPUTE, Event

# Kinds of placed parts beside those of a schedule's actions.
MICRO_BATCH = "M"
END = "U"
# What a rank does that is in no timeline: the update, and sending to the next stage.
OPTIMIZER = "optimizer"
SEND = "send pp"


@dataclass(frozen=True)
class StreamSpan:
    """One occupation of a stream without a pause, in seconds."""

    stream: str
    what: str
    start: float
    end: float

    def continues_as(self, later: StreamSpan) -> bool:
        """Return whether a later span of the stream is the same without a pause."""
        is_same = self.what == later.what
        return is_same and self.end == later.start


@dataclass
class StreamRecord(StreamTimes):
    """Times of streams, with what each did in between; what continues without a pause is one span."""

    latest: dict[str, StreamSpan] = field(default_factory=dict)
    finished: list[StreamSpan] = field(default_factory=list)

    def occupy(
        self,
        stream: str,
        what: str,
        start: float,
        seconds: float,
    ) -> float:
        """Let a stream do something from ``start`` on, and return when that ends."""
        end = super().occupy(stream, what, start, seconds)
        span = StreamSpan(stream, what, start, end)
        latest = self.latest.get(stream)
        if latest is not None:
            if latest.continues_as(span):
                span = replace(latest, end=end)
            else:
                self.finished.append(latest)
        self.latest[stream] = span
        return end

    def spans(self) -> list[StreamSpan]:
        """Return all spans by their start."""
        every = [*self.finished, *self.latest.values()]
        return sorted(every, key=lambda span: span.start)


@dataclass(frozen=True)
class StepPart:
    """Part of a rank's step: spans of its streams, in seconds from the part's beginning."""

    name: str
    spans: list[StreamSpan]


@dataclass(frozen=True)
class PlacedPart:
    """Place in time of a part of a rank's step, or of a piece of the part.

    Attributes:
        part: index among the parts of the rank.
        kind: of an action ("F", "B", "I", "W"), ``MICRO_BATCH``, or ``END``: the last micro-batch's communication
            and the update.
        offset: seconds of the part that came before.
    """

    part: int
    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float
    offset: float = 0.0


@dataclass(frozen=True)
class RankSpans:
    """The step of one rank."""

    rank: int
    parts: list[StepPart]
    placed: list[PlacedPart]


@dataclass(frozen=True)
class StepSpans:
    """The step of the ranks of one pipeline, and its time.

    Attributes:
        timelines: what was traced of each rank.
    """

    time: StepTime
    ranks: list[RankSpans]
    timelines: list[RankTimeline]


def predict_spans(config: Config, world_size: int, device: Device) -> StepSpans:
    """Predict a step as ``predict_step`` does, with what each stream does when.

    Raises:
        UserError: the layout does not fit.
    """
    device = device.in_world(world_size)
    pipeline = first_pipeline(config, world_size)
    timelines = []
    seconds = []
    for rank in pipeline:
        timeline = trace_timeline(config, world_size, rank, traced_device(device))
        timelines.append(timeline)
        timed = time_rank(timeline, config, world_size, rank, device)
        seconds.append(timed)
    pipeline_times = None
    if len(pipeline) > 1:
        pipeline_times = _PipelineTimes.of(seconds, config, world_size, device)
    ranks = []
    for position, rank in enumerate(pipeline):
        record = _recorder(timelines[position], config, world_size, rank, device)
        own = seconds[position]
        if pipeline_times is None:
            parts, placed = _alone(record, own, config.data.micro_num)
        else:
            parts, placed = _in_pipeline(record, own, position, pipeline_times)
        ranks.append(RankSpans(rank, parts, placed))
    return StepSpans(
        time=combine(seconds, config, world_size, device),
        ranks=ranks,
        timelines=timelines,
    )


@dataclass(frozen=True)
class _PipelineTimes:
    """Times of the actions of all ranks of a pipeline.

    Attributes:
        end: when the last rank has done all of its actions.
        hop: seconds from one stage to the next.
        last_stage: its number.
    """

    actions: TimedActions
    end: float
    hop: float
    last_stage: int

    @staticmethod
    def of(
        seconds: Sequence[RankSeconds], config: Config, world_size: int, device: Device
    ) -> _PipelineTimes:
        actions = schedule_ranks(seconds, config, world_size, device)
        stages: set[int] = set()
        for rank in seconds:
            stages.update(rank.stages)
        return _PipelineTimes(
            actions=actions,
            end=last_end(actions),
            hop=hop_seconds(config, world_size, device),
            last_stage=max(stages),
        )

    def sends(self, kind: str, stage: int) -> bool:
        """Return whether a stage sends what it has computed: hidden states on, gradients back."""
        if kind == "F":
            return stage < self.last_stage
        return stage > 0


# Simulates the sections of a timeline with these beginnings.
Record = Callable[..., StreamRecord]
PartsAndPlaces = tuple[list[StepPart], list[PlacedPart]]


def _recorder(
    traced: RankTimeline, config: Config, world_size: int, rank: int, device: Device
) -> Record:
    places = axis_placements(config, world_size, rank, device)
    dtype = config.model.dtype.removeprefix("torch.")

    def record(*prefixes: str) -> StreamRecord:
        times = StreamRecord()
        if UPDATE in prefixes:
            sums, gathers = traced.end_of_step()
            simulate(sums, device, dtype, places, times)
            update = traced.update_seconds(device)
            times.occupy(COMPUTE, OPTIMIZER, times.end, update)
            return simulate_more(gathers, times)
        events = []
        for prefix in prefixes:
            events += traced.part(prefix)
        return simulate_more(events, times)

    def simulate_more(events: Sequence[Event], times: StreamRecord) -> StreamRecord:
        simulate(events, device, dtype, places, times)
        return times

    return record


def _alone(
    record: Record,
    seconds: RankSeconds,
    count: int,
) -> PartsAndPlaces:
    """Return the step of a rank without a pipeline: one micro-batch after the other, the update after the last."""
    micro_batch = record(FIRST)
    last = record(LAST, UPDATE)
    parts = [
        StepPart("micro-batch", micro_batch.spans()),
        StepPart("last", last.spans()),
    ]
    placed = []
    length = seconds.micro_batch
    for index in range(count - 1):
        start = index * length
        part = PlacedPart(0, MICRO_BATCH, 0, index, start, start + length)
        placed.append(part)
    before_update = count * length
    begun = PlacedPart(
        part=1,
        kind=MICRO_BATCH,
        stage=0,
        micro_batch=count - 1,
        start=before_update - length,
        end=before_update,
    )
    tail = replace(
        begun,
        kind=END,
        start=before_update,
        end=before_update + seconds.last,
        offset=length,
    )
    placed += [begun, tail]
    return parts, placed


def _in_pipeline(
    record: Record,
    seconds: RankSeconds,
    position: int,
    pipeline: _PipelineTimes,
) -> PartsAndPlaces:
    """Return the step of the rank at a position of a pipeline."""
    parts: list[StepPart] = []
    index_of = {}
    for stage, length in seconds.stages.items():
        for kind, duration in (("F", length.forward), ("B", length.backward)):
            spans = record(f"{FIRST}, {kind} {stage};").spans()
            if pipeline.sends(kind, stage):
                arrival = duration + pipeline.hop
                spans.append(StreamSpan(SEND, SEND, duration, arrival))
            index_of[kind, stage] = len(parts)
            parts.append(StepPart(f"{kind} {stage}", spans))
    last = record(LAST, UPDATE)
    parts.append(StepPart("last", last.spans()))

    placed = []
    for action, start, stop in pipeline.actions[position]:
        kind = action.kind
        part = index_of["F" if kind == "F" else "B", action.stage]
        # The gradients of weights are the second half of backward.
        offset = seconds.stages[action.stage].backward / 2 if kind == "W" else 0.0
        stage = action.stage
        place = PlacedPart(part, kind, stage, action.micro_batch, start, stop, offset)
        placed.append(place)
    tail = PlacedPart(
        part=len(parts) - 1,
        kind=END,
        stage=0,
        micro_batch=0,
        start=pipeline.end,
        end=pipeline.end + seconds.last,
        offset=seconds.micro_batch,
    )
    placed.append(tail)
    return parts, placed
