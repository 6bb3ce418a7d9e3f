"""Which layers each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate


def layer_ranges(
    num_layers: int, pp: int, chunks: int = 1, ends: tuple[float, float] | None = None
) -> list[range]:
    """The layers of each of ``pp * chunks`` stages, in the order in which tokens pass through them.

    Args:
        chunks: stages that each rank holds. Each run of ``num_layers / chunks`` layers is shared out evenly, the
            remainder to its last stages, as InternEvo does; layers that do not divide are shared out over all stages.
        ends: what embedding and head weigh, in layers (``pipeline.balance``): even weights then. None: they weigh
            nothing.
    Raises:
        ValueError: more stages than layers.
    """
    stages = pp * chunks
    if stages > num_layers:
        raise ValueError(f"{stages} stages need at least as many layers, there are {num_layers}")
    if ends is not None:
        return _balanced(num_layers, stages, ends)
    runs = chunks if num_layers % chunks == 0 else 1
    base, extra = divmod(num_layers // runs, stages // runs)
    return _ranges([base + (position >= stages // runs - extra) for position in range(stages // runs)] * runs)


def _ranges(counts: Sequence[int]) -> list[range]:
    stops = list(accumulate(counts))
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def _balanced(num_layers: int, stages: int, ends: tuple[float, float]) -> list[range]:
    """Contiguous stages of at least one layer whose heaviest is as light as can be; of equals, the more even one."""
    first, last = ends

    def weight(stage: int, count: int) -> float:
        return count + (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)

    @cache
    def best(stage: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(heaviest, sum of squares, layer counts) of the stages from ``stage`` on, which share ``left`` layers."""
        if stage == stages - 1:
            return weight(stage, left), weight(stage, left) ** 2, (left,)
        choices = []
        for count in range(1, left - (stages - 1 - stage) + 1):
            heaviest, squares, counts = best(stage + 1, left - count)
            own = weight(stage, count)
            choices.append((max(own, heaviest), squares + own**2, (count, *counts)))
        return min(choices)

    return _ranges(best(0, num_layers)[2])


def stages_of_rank(rank: int, pp: int, chunks: int, schedule: str) -> list[int]:
    """The stages that pipeline rank ``rank`` holds: in a loop over the ranks, or in a V there and back (zbv)."""
    if schedule == "zbv":
        return [rank, 2 * pp - 1 - rank]
    return [rank + chunk * pp for chunk in range(chunks)]
