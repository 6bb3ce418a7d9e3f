"""Search for the fastest layout that fits, among all that the rules allow.

    every choice -> allowed by the rules -> weights can fit -> least recomputing that fits -> speed
                    is_allowed              MemoryFloor        peak                           least_seconds, step_time

Nothing is left out that could be among the fastest: a bound of the time from below says
in which order pipelines are simulated, and when no other can be faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from evomesh.config.schema import Config
from evomesh.plan.device import Device
from evomesh.plan.layout_choice import (
    RECOMPUTE,
    LayoutChoice,
    every_choice,
    is_allowed,
    least_changes,
    single_changes,
)
from evomesh.plan.memory import PeakMemory
from evomesh.plan.memory_floor import MemoryFloor
from evomesh.plan.step_time import StepTime

# How many are predicted to the end.
BEST = 10
# Predictions are not exact enough to tell apart layouts whose times differ by less: of
# these the one that leaves the most memory comes first.
AS_FAST = 0.01
# Faster ones that do not fit, for which a change is named.
_NEAR = 3


class LayoutPredictor(Protocol):
    """Answers to what a search asks about layouts of one config on one device."""

    config: Config
    world_size: int
    device: Device
    capacity: int

    def peak(self, choice: LayoutChoice) -> PeakMemory: ...

    def least_seconds(self, choice: LayoutChoice) -> float: ...

    def step_time(self, choice: LayoutChoice) -> StepTime: ...


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
class NearMiss:
    """A layout that would be faster than the best one, but does not fit.

    Attributes:
        missing: bytes.
        changes: single changes with which it fits.
    """

    choice: LayoutChoice
    missing: int
    changes: list[LayoutChoice]


@dataclass
class SearchCounts:
    """Numbers of layouts by what became of them.

    Attributes:
        refused: by the rules of the config.
        pruned: whose weights and optimizer state alone are too large.
        too_large: that do not fit even with all layers recomputed.
        slower: with more recomputing than they need.
        fitting: that fit.
    """

    refused: int = 0
    pruned: int = 0
    too_large: int = 0
    slower: int = 0
    fitting: int = 0

    @property
    def total(self) -> int:
        predicted = self.too_large + self.slower + self.fitting
        return self.refused + self.pruned + predicted


@dataclass(frozen=True)
class SearchResult:
    """The fastest layouts that fit, then the nearest to fitting.

    First come those within ``AS_FAST`` of the fastest, by memory, then the others, by speed.

    Attributes:
        near: faster ones that do not fit.
    """

    predictions: list[LayoutPrediction]
    near: list[NearMiss] = field(default_factory=list)
    counts: SearchCounts = field(default_factory=SearchCounts)

    @property
    def fitting(self) -> list[LayoutPrediction]:
        return [found for found in self.predictions if found.time is not None]


def search(predictor: LayoutPredictor) -> SearchResult:
    """Predict every allowed layout, and return the fastest."""
    counts = SearchCounts()
    fitting: list[LayoutPrediction] = []
    too_large: list[LayoutPrediction] = []
    for choice in _possible_choices(predictor, counts):
        found = _least_recomputing(predictor, choice, counts)
        if found.peak.missing(predictor.capacity) > 0:
            too_large.append(found)
        else:
            fitting.append(found)
    counts.fitting = len(fitting)
    fastest = _fastest(predictor, fitting)
    nearest = sorted(too_large, key=lambda found: found.peak.needed)
    near = []
    if fastest:
        least = min(map(_seconds, fastest))
        near = list(_near_misses(predictor, least, fitting + too_large))
    return SearchResult(fastest + nearest, near, counts)


def _possible_choices(
    predictor: LayoutPredictor, counts: SearchCounts
) -> Iterator[LayoutChoice]:
    """Yield the layouts that are allowed and whose weights can fit."""
    config = predictor.config
    world_size = predictor.world_size
    floor = MemoryFloor(config, world_size)
    per_node = predictor.device.gpus_per_node
    variants = len(RECOMPUTE)
    for choice in every_choice(config, world_size, per_node):
        if not is_allowed(config, choice, world_size):
            counts.refused += variants
        elif floor.peak(choice).missing(predictor.capacity) > 0:
            counts.pruned += variants
        else:
            yield choice


def _least_recomputing(
    predictor: LayoutPredictor, choice: LayoutChoice, counts: SearchCounts
) -> LayoutPrediction:
    """Return a layout with the least recomputing with which it fits; with all of it where none does."""
    for tried, fraction in enumerate(RECOMPUTE, 1):
        changed = replace(choice, recompute=fraction)
        peak = predictor.peak(changed)
        if peak.missing(predictor.capacity) <= 0:
            counts.slower += len(RECOMPUTE) - tried
            counts.too_large += tried - 1
            break
    else:
        counts.too_large += len(RECOMPUTE)
    return LayoutPrediction(changed, peak, None)


def _fastest(
    predictor: LayoutPredictor, fitting: Sequence[LayoutPrediction]
) -> list[LayoutPrediction]:
    """Return the fastest, with their times: those that are as fast as the fastest by memory, then the others."""
    bounds = []
    for position, found in enumerate(fitting):
        least = predictor.least_seconds(found.choice)
        bounds.append((least, found.peak.needed, position))
    timed: list[LayoutPrediction] = []
    for least, _, position in sorted(bounds):
        if len(timed) >= BEST and least > _slowest_shown(timed):
            break
        found = fitting[position]
        time = predictor.step_time(found.choice)
        timed.append(replace(found, time=time))
        timed.sort(key=_rank_key)
    return _by_memory_where_as_fast(timed)[:BEST]


def _slowest_shown(timed: Sequence[LayoutPrediction]) -> float:
    """Return the seconds above which a layout changes nothing: of the last one shown, or as fast as the first."""
    as_fast = _seconds(timed[0]) * (1 + AS_FAST)
    return max(_seconds(timed[BEST - 1]), as_fast)


def _by_memory_where_as_fast(
    timed: Sequence[LayoutPrediction],
) -> list[LayoutPrediction]:
    """Order layouts, given by speed, so that those as fast as the first come by memory."""
    if not timed:
        return []
    fastest = timed[0].seconds_per_token()
    limit = fastest * (1 + AS_FAST)
    as_fast = []
    slower = []
    for found in timed:
        if found.seconds_per_token() <= limit:
            as_fast.append(found)
        else:
            slower.append(found)
    as_fast.sort(key=_memory_key)
    return as_fast + slower


def _near_misses(
    predictor: LayoutPredictor,
    fastest: float,
    found: Iterable[LayoutPrediction],
) -> Iterator[NearMiss]:
    """Yield layouts without recomputing that would take less than ``fastest`` seconds if they fitted."""
    faster = []
    for prediction in found:
        plain = replace(prediction.choice, recompute=0.0)
        could_be_faster = predictor.least_seconds(plain) < fastest
        missing = predictor.peak(plain).missing(predictor.capacity)
        if could_be_faster and missing > 0:
            faster.append((missing, str(plain), plain))
    left = _NEAR
    for missing, _, choice in sorted(faster):
        if predictor.step_time(choice).seconds < fastest:
            yield NearMiss(choice, missing, changes_that_fit(predictor, choice))
            left -= 1
        if left == 0:
            break


def changes_that_fit(
    predictor: LayoutPredictor, choice: LayoutChoice
) -> list[LayoutChoice]:
    """Return the layouts with one change that fit, of each kind of change the smallest."""

    def fits(changed: LayoutChoice) -> bool:
        return predictor.peak(changed).missing(predictor.capacity) <= 0

    several = single_changes(predictor.config, choice, predictor.world_size)
    return list(least_changes(several, fits))


def _seconds(prediction: LayoutPrediction) -> float:
    return prediction.time.seconds if prediction.time else float("inf")


def _rank_key(prediction: LayoutPrediction) -> tuple[float, int]:
    return prediction.seconds_per_token(), prediction.peak.needed


def _memory_key(prediction: LayoutPrediction) -> tuple[int, float]:
    return prediction.peak.needed, prediction.seconds_per_token()
