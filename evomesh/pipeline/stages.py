"""The layers that each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple


def layer_ranges(
    num_layers: int, pp: int, chunks: int = 1, ends: tuple[float, float] | None = None
) -> list[range]:
    """Return the layers of each of ``pp * chunks`` stages, in the order in which tokens pass through them.

    Args:
        chunks: stages per rank. Every ``num_layers / chunks`` consecutive layers are distributed evenly over pp
            stages, the remainder to the last ones, as InternEvo does. If ``num_layers`` is not divisible by
            ``chunks``, all layers are distributed over all stages at once.
        ends: weights of embedding and head, in layers (``pipeline.balance``); layers are then distributed so that
            the heaviest stage is as light as possible. None: embedding and head are ignored.

    Raises:
        ValueError: more stages than layers.
    """
    stages = pp * chunks
    if stages > num_layers:
        raise ValueError(
            f"{stages} stages need at least as many layers, there are {num_layers}"
        )
    if ends is not None:
        return _balanced(num_layers, stages, ends)
    rounds = chunks if num_layers % chunks == 0 else 1
    stages_per_round = stages // rounds
    base, remainder = divmod(num_layers // rounds, stages_per_round)
    counts = [
        base + (position >= stages_per_round - remainder)
        for position in range(stages_per_round)
    ]
    return _ranges(counts * rounds)


def _ranges(counts: Sequence[int]) -> list[range]:
    stops = list(accumulate(counts))
    return [
        range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)
    ]


class _Distribution(NamedTuple):
    """Layer counts of consecutive stages.

    Tuples compare by their first field, then by the second: the smallest of several
    distributions has the lightest heaviest stage and, of equals, the most even ones.
    """

    heaviest: float
    squares: float
    counts: tuple[int, ...]

    def after_stage(self, weight: float, count: int) -> _Distribution:
        """Return the distribution with a stage of ``count`` layers before these."""
        heaviest = max(weight, self.heaviest)
        squares = self.squares + weight**2
        counts = (count, *self.counts)
        return _Distribution(heaviest, squares, counts)


def _balanced(num_layers: int, stages: int, ends: tuple[float, float]) -> list[range]:
    """Return contiguous stages of at least one layer with the lightest heaviest stage; of equals, the most even.

    Dynamic programming over the stages: the best distribution of the remaining layers
    over the remaining stages. With 8 layers, 2 stages and a head as heavy as 2 layers,
    5 + 3 is best: both stages weigh 5.
    """
    embedding, head = ends
    last_stage = stages - 1

    def weight(stage: int, count: int) -> float:
        """Return the weight of a stage of ``count`` layers, in layers."""
        total = float(count)
        if stage == 0:
            total += embedding
        if stage == last_stage:
            total += head
        return total

    @cache
    def best(stage: int, left: int) -> _Distribution:
        """Distribute ``left`` layers over ``stage`` and later ones."""
        if stage == last_stage:
            this_stage = weight(stage, left)
            return _Distribution(this_stage, this_stage**2, (left,))
        # Each later stage needs at least one layer.
        later_stages = last_stage - stage
        most = left - later_stages
        choices = []
        for count in range(1, most + 1):
            later = best(stage + 1, left - count)
            this_stage = weight(stage, count)
            choice = later.after_stage(this_stage, count)
            choices.append(choice)
        return min(choices)

    distribution = best(0, num_layers)
    return _ranges(distribution.counts)


def stages_of_rank(rank: int, pp: int, chunks: int, schedule: str) -> list[int]:
    """Return the stages of pipeline rank ``rank``: round-robin, or down and up again in a V (zbv)."""
    if schedule == "zbv":
        return [rank, 2 * pp - 1 - rank]
    return [rank + chunk * pp for chunk in range(chunks)]
