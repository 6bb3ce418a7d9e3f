"""Search for the fastest layout that fits: thousands are predicted from traces of models of one and two layers.

What a rank does and holds grows by the same amount with each of its layers, so that two
small traces give the line on which every depth is:

    depth 1, depth 2  ->  seconds and bytes at the depth of the model  ->  the best, traced whole
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context

from evomesh.config.layout import axis_sizes, pipeline_schedule
from evomesh.config.schema import Config
from evomesh.pipeline.stages import layer_ranges, stages_of_rank
from evomesh.plan.device import Device
from evomesh.plan.layout_choice import (
    LayoutChoice,
    base_choices,
    refinements,
    with_choice,
)
from evomesh.plan.memory import (
    GIB,
    Peak,
    PeakMemory,
    TracedMemory,
    held_by_kind,
    micro_batches_in_flight,
    peak_memory,
    trace_memory,
)
from evomesh.plan.pipeline_time import StageSeconds
from evomesh.plan.step_time import (
    RankSeconds,
    StepTime,
    combine,
    hop_seconds,
    predict_step,
    time_rank,
    trace_timeline,
)
from evomesh.plan.trace import built_rank

# The best ones, whose neighbors are tried too; and those that are predicted once more,
# from traces of the whole model.
_REFINED = 8
_FINALISTS = 12


@dataclass(frozen=True)
class LayoutPrediction:
    """What a layout needs and how fast it is; ``time`` is None for one that does not fit."""

    choice: LayoutChoice
    peak: PeakMemory
    time: StepTime | None

    def seconds_per_token(self) -> float:
        """Return GPU seconds of a token; infinite where the layout does not fit."""
        if self.time is None:
            return float("inf")
        return 1 / self.time.tokens_per_second


@dataclass(frozen=True)
class SearchResult:
    """Layouts by speed; those that do not fit come last, the nearest to fitting first."""

    predictions: list[LayoutPrediction]

    @property
    def fitting(self) -> list[LayoutPrediction]:
        return [found for found in self.predictions if found.time is not None]


@dataclass(frozen=True)
class LayoutPredictor:
    """Predicts layouts of one config on one device."""

    config: Config
    world_size: int
    device: Device

    @property
    def capacity(self) -> int:
        """Bytes of one device."""
        return int(self.device.memory_gib * GIB)

    def predict(self, choice: LayoutChoice) -> LayoutPrediction:
        """Predict one layout: first whether it fits, then its time."""
        config = with_choice(self.config, choice)
        ranks = _different_ranks(choice.pipeline)
        peak = self._held(config)
        if peak.missing(self.capacity) > 0:
            return LayoutPrediction(choice, peak, None)
        for rank in ranks:
            of_rank = self._memory(config, rank).peak()
            peak = max(peak, of_rank, key=lambda peak: peak.total)
        if peak.missing(self.capacity) > 0:
            return LayoutPrediction(choice, peak, None)
        return LayoutPrediction(choice, peak, self.time(choice))

    def predict_whole(self, choice: LayoutChoice) -> LayoutPrediction:
        """Predict one layout from traces of the whole model, which takes seconds."""
        config = with_choice(self.config, choice)
        peaks = []
        for pipeline_rank in _different_ranks(choice.pipeline):
            rank = self._global_rank(config, pipeline_rank)
            peaks.append(peak_memory(config, self.world_size, rank))
        peak = max(peaks, key=lambda peak: peak.total)
        if peak.missing(self.capacity) > 0:
            return LayoutPrediction(choice, peak, None)
        time = predict_step(config, self.world_size, self.device)
        return LayoutPrediction(choice, peak, time)

    def time(self, choice: LayoutChoice) -> StepTime:
        """Predict the time of a step, whether or not it fits."""
        config = with_choice(self.config, choice)
        ranks = _different_ranks(choice.pipeline)
        traced = {rank: self._seconds(config, rank) for rank in ranks}
        in_order = []
        for rank in range(choice.pipeline):
            like = _stand_in(rank, choice.pipeline)
            in_order.append(_renumbered(traced[like], config, rank))
        hop = hop_seconds(config, self.world_size, self.device)
        return combine(in_order, config, self.world_size, hop)

    def _held(self, config: Config) -> PeakMemory:
        """Return what the first rank holds between steps: too much already rules a layout out, without a trace."""
        one, two = (self._held_at(config, depth) for depth in (1, 2))
        depth = _mean_depth(config, 0)
        held = {kind: _line(size, two[kind], depth) for kind, size in one.items()}
        return PeakMemory(held, "update")

    def _held_at(self, config: Config, depth: int) -> dict[str, int]:
        shallow = _with_depth(config, depth)
        with built_rank(shallow, self.world_size, 0) as (_, stages, optimizer):
            return held_by_kind(stages, optimizer)

    def _memory(self, config: Config, pipeline_rank: int) -> TracedMemory:
        """Return what a rank holds at the depth of the model."""
        rank = self._global_rank(config, pipeline_rank)
        traces = []
        for depth in (1, 2):
            shallow = _with_depth(config, depth)
            traces.append(trace_memory(shallow, self.world_size, rank))
        one, two = traces
        layers = _mean_depth(config, pipeline_rank)
        held = {}
        for kind, size in one.held.items():
            held[kind] = _line(size, two.held[kind], layers)
        peaks = {}
        for phase, peak in one.peaks.items():
            other = two.peaks[phase]
            peaks[phase] = Peak(
                _line(peak.nbytes, other.nbytes, layers),
                _line(peak.gathered, other.gathered, layers),
            )
        in_flight = micro_batches_in_flight(
            config, pipeline_rank, config.parallel.pipeline.size
        )
        kept = _line(one.kept, two.kept, layers)
        return TracedMemory(held, kept, peaks, in_flight)

    def _seconds(self, config: Config, pipeline_rank: int) -> RankSeconds:
        """Return the times of a rank at the depth of the model."""
        rank = self._global_rank(config, pipeline_rank)
        times = []
        for depth in (1, 2):
            shallow = _with_depth(config, depth)
            timeline = trace_timeline(shallow, self.world_size, rank)
            seconds = time_rank(timeline, shallow, self.world_size, rank, self.device)
            times.append(seconds)
        one, two = times
        return _at_depth(one, two, _mean_depth(config, pipeline_rank))

    def _global_rank(self, config: Config, pipeline_rank: int) -> int:
        sizes = axis_sizes(config.parallel, self.world_size)
        return pipeline_rank * sizes.ranks_per_stage


def search(predictor: LayoutPredictor, processes: int = 1) -> SearchResult:
    """Predict every allowed layout, then the neighbors of the best, and the best of all with their whole model.

    Args:
        processes: that trace at the same time.
    """
    config = predictor.config
    world_size = predictor.world_size
    choices = list(base_choices(config, world_size, predictor.device.gpus_per_node))
    # Processes that have nothing to trace would only cost their start.
    with _mapping(min(processes, len(choices))) as predict_all:
        found = predict_all(predictor.predict, choices)
        # Recomputing costs a second forward: it is for what does not fit without.
        recomputing = []
        for choice, prediction in found.items():
            if prediction.time is None:
                recomputing.append(replace(choice, recompute=1.0))
        found |= predict_all(predictor.predict, recomputing)

        nearby: dict[LayoutChoice, None] = {}
        for choice in _best(found, _REFINED):
            for neighbor in refinements(config, choice, world_size):
                if neighbor not in found:
                    nearby[neighbor] = None
        found |= predict_all(predictor.predict, list(nearby))

        finalists = _best(found, _FINALISTS)
        whole = predict_all(predictor.predict_whole, finalists)
    others = {choice: found[choice] for choice in found if choice not in whole}
    in_order = sorted(whole.values(), key=_rank_key)
    in_order += sorted(others.values(), key=_rank_key)
    return SearchResult(in_order)


Predictions = dict[LayoutChoice, LayoutPrediction]
Predict = Callable[[LayoutChoice], LayoutPrediction]
PredictAll = Callable[[Predict, Sequence[LayoutChoice]], Predictions]


@contextmanager
def _mapping(processes: int) -> Iterator[PredictAll]:
    """Give a function that predicts layouts, in this process or in several others."""
    if processes <= 1:
        yield lambda predict, choices: {one: predict(one) for one in choices}
        return
    # A traced world is a process group: a fork would inherit it.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:

        def predict_all(
            predict: Predict, choices: Sequence[LayoutChoice]
        ) -> Predictions:
            predictions = pool.map(predict, choices)
            return dict(zip(choices, predictions, strict=True))

        yield predict_all


def _best(found: Predictions, count: int) -> list[LayoutChoice]:
    """Return the fastest layouts that fit."""
    fitting = [one for one in found.values() if one.time is not None]
    fastest = sorted(fitting, key=_rank_key)[:count]
    return [prediction.choice for prediction in fastest]


def _rank_key(prediction: LayoutPrediction) -> tuple[float, int]:
    return prediction.seconds_per_token(), prediction.peak.total


def _different_ranks(pipeline: int) -> list[int]:
    """Return the ranks of a pipeline that differ: with the embedding, in the middle, with the head."""
    return sorted({_stand_in(rank, pipeline) for rank in range(pipeline)})


def _stand_in(rank: int, pipeline: int) -> int:
    if rank in (0, pipeline - 1):
        return rank
    return 1


def _with_depth(config: Config, depth: int) -> Config:
    """Return the config with ``depth`` layers in each stage."""
    stages = config.parallel.pipeline.size * config.model.num_chunks
    model = config.model.model_copy(update={"num_layers": stages * depth})
    return config.model_copy(update={"model": model})


def _stage_depths(config: Config) -> list[int]:
    """Return the number of layers of each stage."""
    model = config.model
    pp = config.parallel.pipeline.size
    return [
        len(layers) for layers in layer_ranges(model.num_layers, pp, model.num_chunks)
    ]


def _stages_of(config: Config, pipeline_rank: int) -> list[int]:
    pp = config.parallel.pipeline.size
    if pp == 1:
        return [0]
    kind = pipeline_schedule(config)
    return stages_of_rank(pipeline_rank, pp, config.model.num_chunks, kind)


def _mean_depth(config: Config, pipeline_rank: int) -> float:
    """Return the layers of a stage of a rank."""
    depths = _stage_depths(config)
    own = [depths[stage] for stage in _stages_of(config, pipeline_rank)]
    return sum(own) / len(own)


def _line(one: float, two: float, depth: float) -> int:
    """Return the value at ``depth`` of the line through those at 1 and 2."""
    return round(one + (two - one) * (depth - 1))


def _at_depth(one: RankSeconds, two: RankSeconds, depth: float) -> RankSeconds:
    """Return the times of a rank whose stages have ``depth`` layers."""

    def line(first: float, second: float) -> float:
        return first + (second - first) * (depth - 1)

    stages = {}
    for stage, seconds in one.stages.items():
        deeper = two.stages[stage]
        stages[stage] = StageSeconds(
            line(seconds.forward, deeper.forward),
            line(seconds.backward, deeper.backward),
        )
    busy = {}
    for what, time in one.busy.items():
        busy[what] = line(time, two.busy.get(what, time))
    return RankSeconds(
        stages=stages,
        micro_batch=line(one.micro_batch, two.micro_batch),
        exposed=_growing(one.exposed, two.exposed, depth),
        last=_growing(one.last, two.last, depth),
        busy=busy,
    )


def _growing(one: float, two: float, depth: float) -> float:
    """Return the wait at ``depth``; where more layers hide more of it, the one at 2."""
    growth = max(two - one, 0.0)
    return two + growth * (depth - 2)


def _renumbered(seconds: RankSeconds, config: Config, rank: int) -> RankSeconds:
    """Return the times of a rank for another one of the middle, whose stages have other numbers."""
    numbers = _stages_of(config, rank)
    stages = dict(zip(numbers, seconds.stages.values(), strict=True))
    return replace(seconds, stages=stages)
