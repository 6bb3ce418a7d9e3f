"""Sizes of the axes of a layout, and the nodes on which they are."""

from __future__ import annotations

from dataclasses import dataclass

from evomesh.plan.bucket_time import StateAxes
from evomesh.plan.layout_choice import LayoutChoice
from evomesh.plan.part_time import SHARDS
from evomesh.plan.part_trace import ShardShape
from evomesh.plan.simulate import AxisPlacement


@dataclass(frozen=True)
class LayoutSizes:
    """Sizes of the axes of a layout, and on which nodes they are."""

    choice: LayoutChoice
    world_size: int
    per_node: int

    @property
    def ranks_per_stage(self) -> int:
        return self.world_size // self.choice.pipeline

    @property
    def weight_shards(self) -> int:
        choice = self.choice
        return choice.weight if choice.mode == "isp" else choice.tensor

    @property
    def zero_group(self) -> int:
        """Return how many ranks of a stage hold the same shard of the weights."""
        return self.ranks_per_stage // self.weight_shards

    @property
    def zero(self) -> int:
        """Return the size of the zero axis: as a config asks, at most all that hold the same shard."""
        return min(self.choice.zero, self.zero_group)

    @property
    def state_axes(self) -> StateAxes:
        data = self.ranks_per_stage // self.choice.tensor
        group = self.zero_group
        return StateAxes(
            zero=self.zero,
            replica=group // self.zero,
            data=data,
            views_agree=group == data,
        )

    def placements(self) -> dict[str, AxisPlacement]:
        """Return ranks and nodes of the axes, in the arithmetic of ``axis_members``."""
        places = {}
        for name, axis in self._axes().items():
            places[name] = self._place(axis)
        of_weights = "wp" if self.choice.mode == "isp" else "zero"
        places[SHARDS] = places[of_weights]
        return places

    def _place(self, axis: tuple[int, int]) -> AxisPlacement:
        distance, size = axis
        return AxisPlacement(size, self._nodes(distance, size))

    @property
    def communicators(self) -> int:
        """Return how many communicators a rank has: axes of the same ranks share one."""
        choice = self.choice
        axes = list(self._axes().values())
        axes.append((self.ranks_per_stage, choice.pipeline))
        return len({axis for axis in axes if axis[1] > 1})

    def _axes(self) -> dict[str, tuple[int, int]]:
        """Return the distance of neighbors and the size of each axis in a stage."""
        choice = self.choice
        axes = self.state_axes
        weight = self.weight_shards
        return {
            "tp": (1, choice.tensor),
            "wp": (1, choice.weight),
            "dp": (choice.tensor, axes.data),
            "zero": (weight, axes.zero),
            "replica": (weight * axes.zero, axes.replica),
        }

    def _nodes(self, distance: int, size: int) -> int:
        if distance >= self.per_node:
            return size
        farthest = distance * (size - 1)
        return farthest // self.per_node + 1

    def shard_shape(self) -> ShardShape:
        """Return the shapes of a rank's tensors; depth, recomputing and position are those of a stage."""
        choice = self.choice
        shards = 1
        if choice.mode == "isp":
            shards = choice.weight
        elif choice.fsdp:
            shards = self.zero
        return ShardShape(
            mode=choice.mode,
            tensor=choice.tensor,
            shards=shards,
            micro_bsz=choice.micro_bsz,
            recompute=False,
            depth=1,
            is_middle=False,
        )
