"""How one parameter is cut over the grid: exactly one ``ShardSpec`` each.

Slicing, gradient sync, norm de-duplication, checkpoints, export and the planner derive from it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from evomesh.parallel.grid import Axis, Grid


@dataclass(frozen=True)
class ShardSpec:
    """Args:
    shape: global shape of the tensor.
    shards: (axis name, tensor dim) pairs, outer to inner, along which this rank holds one contiguous range.
    partial: axes over which the local gradient is still a partial sum.
    padding: rows at the end of dim 0 that only this layout has; checkpoints and exports leave them out.
    """

    shape: tuple[int, ...]
    shards: tuple[tuple[str, int], ...] = ()
    partial: frozenset[str] = frozenset()
    padding: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in checkpoints, the same in every layout."""
        return (self.shape[0] - self.padding, *self.shape[1:]) if self.padding else self.shape

    def local_ranges(self, axes: Mapping[str, Axis]) -> tuple[range, ...]:
        """Return the indices of each dim that this rank holds, padding included.

        Args:
            axes: by name (``Grid.axes``); an axis that is missing counts as not sharded.
        """
        ranges = [range(length) for length in self.shape]
        for name, dim in self.shards:
            if name in axes:
                ranges[dim] = axes[name].shard(ranges[dim])
        return tuple(ranges)

    def stored_ranges(self, grid: Grid) -> tuple[range, ...]:
        """Return the part of ``local_ranges`` that checkpoints store: without padding."""
        ranges = zip(self.local_ranges(grid.axes), self.stored_shape, strict=True)
        return tuple(range(min(local.start, end), min(local.stop, end)) for local, end in ranges)


@dataclass(frozen=True)
class LocalShard:
    """The part of a global tensor that this rank holds, and its spec."""

    tensor: torch.Tensor
    spec: ShardSpec


def with_spec(parameter: nn.Parameter, spec: ShardSpec) -> nn.Parameter:
    """Attaches ``spec`` to a parameter; layers call it on each parameter they make."""
    parameter.spec = spec  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: torch.Tensor) -> ShardSpec:
    """The parameter's spec; one without its own is replicated on every rank."""
    spec: ShardSpec = getattr(parameter, "spec", None) or ShardSpec(tuple(parameter.shape))
    return spec


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether FSDP2 has cut it (a DTensor). Told by a method: DTensor takes 0.7 s to import, and few runs have one."""
    return hasattr(tensor, "to_local")


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that FSDP2 has cut; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def state_axes(spec: ShardSpec, grid: Grid) -> tuple[Axis, Axis]:
    """The axes (zero, replica) over which a parameter's optimizer state is cut and repeated.

    Its gradient is summed over both, and over ``spec.partial``. They are the grid's own, except in isp for what lives
    on the tensor axis (embedding, last norm, head): ranks of the weight view's zero axis may lie on different tp ranks
    there, so its state is cut over the whole data axis of the activation view, if at all.
    """
    return optimizer_axes(spec, grid)[:2]


def optimizer_axes(spec: ShardSpec, grid: Grid) -> tuple[Axis, Axis, Axis]:
    """``state_axes`` and the axis inside them: together the ranks of a stage as this parameter sees them, each once."""
    cut_by = {axis for axis, _ in spec.shards}
    # In isp whatever wp does not cut is whole there, on ranks that see different data.
    on_tp = "wp" not in cut_by and ("tp" in spec.partial | cut_by or grid.wp.size > 1)
    views_agree = grid.zero.size * grid.replica.size == grid.dp.size
    if not on_tp:
        return grid.zero, grid.replica, grid.tp if views_agree and grid.wp.size == 1 else grid.wp
    if views_agree:
        return grid.zero, grid.replica, grid.tp
    return (grid.dp, Axis("replica"), grid.tp) if grid.zero.size > 1 else (Axis("zero"), grid.dp, grid.tp)
