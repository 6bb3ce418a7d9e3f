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
from evomesh.plan.depth import (
    SMALL_DEPTHS,
    bytes_at_depth,
    memory_at_depth,
    seconds_at_depth,
)
from evomesh.plan.device import Device
from evomesh.plan.layout_choice import (
    LayoutChoice,
    base_choices,
    refinements,
    with_choice,
)
from evomesh.plan.memory import (
    GIB,
    PeakMemory,
    TracedMemory,
    held_by_kind,
    micro_batches_in_flight,
    peak_memory,
    trace_memory,
)
from evomesh.plan.step_time import (
    RankSeconds,
    StepTime,
    combine,
    predict_step,
    rank_seconds,
)
from evomesh.plan.trace import built_rank

# The best ones, whose neighbors are tried too; and those that are predicted once more,
# from traces of the whole model.
_REFINED = 8
_FINALISTS = 12


@dataclass(frozen=True)
class LayoutPrediction:
    """Memory and time of a layout; ``time`` is None for one that does not fit."""

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

    def base_choices(self) -> list[LayoutChoice]:
        """Return all allowed layouts without recomputing."""
        per_node = self.device.gpus_per_node
        return list(base_choices(self.config, self.world_size, per_node))

    def neighbors(self, found: Predictions) -> list[LayoutChoice]:
        """Return what is next to the best layouts and has not been predicted."""
        nearby: dict[LayoutChoice, None] = {}
        for choice in _best(found, _REFINED):
            for neighbor in refinements(self.config, choice, self.world_size):
                if neighbor not in found:
                    nearby[neighbor] = None
        return list(nearby)

    def predict(self, choice: LayoutChoice) -> LayoutPrediction:
        """Predict one layout: first whether it fits, then its time."""
        config = with_choice(self.config, choice)
        ranks = _different_ranks(choice.pipeline)
        held = self._held(config)
        if self._is_too_large(held):
            return LayoutPrediction(choice, held, None)
        peaks = []
        for rank in ranks:
            traced = self._memory(config, rank)
            peaks.append(traced.peak())
        peak = _largest(peaks)
        if self._is_too_large(peak):
            return LayoutPrediction(choice, peak, None)
        time = self.time(choice)
        return LayoutPrediction(choice, peak, time)

    def predict_whole(self, choice: LayoutChoice) -> LayoutPrediction:
        """Predict one layout from traces of the whole model, which takes seconds."""
        config = with_choice(self.config, choice)
        peaks = []
        for pipeline_rank in _different_ranks(choice.pipeline):
            rank = self._global_rank(config, pipeline_rank)
            peak = peak_memory(config, self.world_size, rank)
            peaks.append(peak)
        largest = _largest(peaks)
        time = None
        if not self._is_too_large(largest):
            time = predict_step(config, self.world_size, self.device)
        return LayoutPrediction(choice, largest, time)

    def _is_too_large(self, peak: PeakMemory) -> bool:
        return peak.missing(self.capacity) > 0

    def time(self, choice: LayoutChoice) -> StepTime:
        """Predict the time of a step, whether or not it fits."""
        config = with_choice(self.config, choice)
        traced = {}
        for rank in _different_ranks(choice.pipeline):
            traced[rank] = self._seconds(config, rank)
        in_order = []
        ranks = range(choice.pipeline)
        for rank in ranks:
            like = _stand_in(rank, choice.pipeline)
            seconds = traced[like]
            own = _renumbered(seconds, config, rank)
            in_order.append(own)
        return combine(in_order, config, self.world_size, self.device)

    def _held(self, config: Config) -> PeakMemory:
        """Return what the first rank holds between steps: too much already rules a layout out, without a trace."""
        one, two = (self._held_at(config, depth) for depth in SMALL_DEPTHS)
        held = bytes_at_depth(one, two, _mean_depth(config, 0))
        return PeakMemory(held, "update")

    def _held_at(self, config: Config, depth: int) -> dict[str, int]:
        shallow = _with_depth(config, depth)
        with built_rank(shallow, self.world_size, 0) as (_, stages, optimizer):
            return held_by_kind(stages, optimizer)

    def _memory(self, config: Config, pipeline_rank: int) -> TracedMemory:
        """Return what a rank holds at the depth of the model."""
        rank = self._global_rank(config, pipeline_rank)
        traces = []
        for depth in SMALL_DEPTHS:
            shallow = _with_depth(config, depth)
            traced = trace_memory(shallow, self.world_size, rank)
            traces.append(traced)
        one, two = traces
        layers = _mean_depth(config, pipeline_rank)
        pp = config.parallel.pipeline.size
        in_flight = micro_batches_in_flight(config, pipeline_rank, pp)
        return memory_at_depth(one, two, layers, in_flight)

    def _seconds(self, config: Config, pipeline_rank: int) -> RankSeconds:
        """Return the times of a rank at the depth of the model."""
        rank = self._global_rank(config, pipeline_rank)
        times = []
        for depth in SMALL_DEPTHS:
            shallow = _with_depth(config, depth)
            seconds = rank_seconds(shallow, self.world_size, rank, self.device)
            times.append(seconds)
        one, two = times
        layers = _mean_depth(config, pipeline_rank)
        return seconds_at_depth(one, two, layers)

    def _global_rank(self, config: Config, pipeline_rank: int) -> int:
        sizes = axis_sizes(config.parallel, self.world_size)
        return pipeline_rank * sizes.ranks_per_stage


def search(predictor: LayoutPredictor, processes: int = 1) -> SearchResult:
    """Predict every allowed layout, then the neighbors of the best, and the best of all with their whole model.

    Args:
        processes: that trace at the same time.
    """
    choices = predictor.base_choices()
    predict = predictor.predict
    # Processes that have nothing to trace would only cost their start.
    processes = min(processes, len(choices))
    with _mapping(processes) as predict_all:
        # 1. All layouts; those that do not fit again with recomputing, which costs a
        #    second forward.
        found = predict_all(predict, choices)
        recomputing = _with_recomputing(found)
        found |= predict_all(predict, recomputing)

        # 2. The neighbors of the best.
        nearby = predictor.neighbors(found)
        found |= predict_all(predict, nearby)

        # 3. The best of all, with the whole model.
        finalists = _best(found, _FINALISTS)
        whole = predict_all(predictor.predict_whole, finalists)
    for choice in whole:
        del found[choice]
    in_order = sorted(whole.values(), key=_rank_key)
    in_order += sorted(found.values(), key=_rank_key)
    return SearchResult(in_order)


def _with_recomputing(found: Predictions) -> list[LayoutChoice]:
    """Return the layouts that do not fit, with all layers recomputed."""
    choices = []
    for choice, prediction in found.items():
        if prediction.time is None:
            choices.append(replace(choice, recompute=1.0))
    return choices


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


def _largest(peaks: Sequence[PeakMemory]) -> PeakMemory:
    return max(peaks, key=lambda peak: peak.total)


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


def _renumbered(seconds: RankSeconds, config: Config, rank: int) -> RankSeconds:
    """Return the times of a rank for another one of the middle, whose stages have other numbers."""
    numbers = _stages_of(config, rank)
    stages = dict(zip(numbers, seconds.stages.values(), strict=True))
    return replace(seconds, stages=stages)
