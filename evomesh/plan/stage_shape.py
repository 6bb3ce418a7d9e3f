"""The stages of a layout: how many layers each has, how many of these are recomputed, and where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from evomesh.pipeline.stages import layer_ranges, stages_of_rank


@dataclass(frozen=True)
class StageShape:
    """Numbers of layers of a stage of a pipeline, and its position."""

    layers: int
    recomputed: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class PipelineShape:
    """Settings that determine the stages of a pipeline.

    Attributes:
        ends: weights of embedding and head where the config balances stages.
        rounds_up: a fraction of layers to recompute is rounded up.
    """

    num_layers: int
    ranks: int
    chunks: int
    schedule: str
    ends: tuple[float, float] | None
    recompute: float
    rounds_up: bool

    def rank_stages(self) -> list[dict[int, StageShape]]:
        """Return the stages of each rank by their number."""
        return _rank_stages(self)

    def stages_of(self, rank: int) -> list[int]:
        """Return the numbers of the stages of a rank."""
        if self.ranks == 1:
            return [0]
        return stages_of_rank(rank, self.ranks, self.chunks, self.schedule)

    def recomputed_of(self, layers: int) -> int:
        """Return how many layers of a stage are recomputed, as the model counts them."""
        count = round(layers * self.recompute, 9)
        return math.ceil(count) if self.rounds_up else math.floor(count)

    def different_ranks(self) -> list[int]:
        """Return the first rank of each kind."""
        return _different_ranks(self)


@cache
def _rank_stages(pipeline: PipelineShape) -> list[dict[int, StageShape]]:
    chunks = pipeline.chunks if pipeline.ranks > 1 else 1
    layers = layer_ranges(pipeline.num_layers, pipeline.ranks, chunks, pipeline.ends)
    if pipeline.ranks == 1:
        layers = [range(pipeline.num_layers)]
    last = len(layers) - 1
    shapes = []
    for number, own in enumerate(layers):
        count = len(own)
        shape = StageShape(
            layers=count,
            recomputed=pipeline.recomputed_of(count),
            is_first=number == 0,
            is_last=number == last,
        )
        shapes.append(shape)
    ranks = []
    for rank in range(pipeline.ranks):
        numbers = pipeline.stages_of(rank)
        stages = {number: shapes[number] for number in numbers}
        ranks.append(stages)
    return ranks


@cache
def _different_ranks(pipeline: PipelineShape) -> list[int]:
    first: dict[tuple[StageShape, ...], int] = {}
    for rank, stages in enumerate(_rank_stages(pipeline)):
        first.setdefault(tuple(stages.values()), rank)
    return list(first.values())
