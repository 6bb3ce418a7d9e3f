"""Shard specs: how one parameter is distributed over the grid. Every parameter has exactly one.

Slicing, gradient sync, norm de-duplication, checkpoints, export and the planner derive
from it alone (invariant 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from evomesh.parallel.grid import Axis, Grid


@dataclass(frozen=True)
class ShardSpec:
    """The distribution of one tensor over the axes of the grid.

    Attributes:
        shape: global shape of the tensor.
        shards: (axis name, tensor dim) pairs, outermost first; each rank holds a contiguous range of the dim.
        partial: axes over which the local gradient is still a partial sum.
        packed_rows: widths along the rows of several matrices that are packed in turn, such as queries, key and value
            of a key/value head; empty for one matrix.
        padding: rows at the end of dim 0 that exist in this layout only; checkpoints and exports omit them.
    """

    shape: tuple[int, ...]
    shards: tuple[tuple[str, int], ...] = ()
    partial: frozenset[str] = frozenset()
    padding: int = 0
    packed_rows: tuple[int, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape in checkpoints, which is the same in every layout."""
        if not self.padding:
            return self.shape
        rows, *others = self.shape
        return (rows - self.padding, *others)

    def local_ranges(self, axes: Mapping[str, Axis]) -> tuple[range, ...]:
        """Return the indices of each dim that this rank holds, padding included.

        Args:
            axes: by name (``Grid.axes``); a missing axis counts as not sharded.
        """
        ranges = [range(length) for length in self.shape]
        for name, dim in self.shards:
            if name in axes:
                ranges[dim] = axes[name].shard(ranges[dim])
        return tuple(ranges)

    def stored_ranges(self, grid: Grid) -> tuple[range, ...]:
        """Return the part of ``local_ranges`` that checkpoints store: without padding."""
        ranges = zip(self.local_ranges(grid.axes), self.stored_shape, strict=True)
        return tuple(
            range(min(local.start, end), min(local.stop, end)) for local, end in ranges
        )


@dataclass(frozen=True)
class LocalShard:
    """The part of a global tensor that this rank holds, and its spec."""

    tensor: torch.Tensor
    spec: ShardSpec


def with_spec(parameter: nn.Parameter, spec: ShardSpec) -> nn.Parameter:
    """Attach ``spec`` to a parameter and return it; layers do this for every parameter they create."""
    parameter.spec = spec  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: torch.Tensor) -> ShardSpec:
    """Return the parameter's spec; a parameter without one is replicated on every rank."""
    spec: ShardSpec = getattr(parameter, "spec", None) or ShardSpec(
        tuple(parameter.shape)
    )
    return spec


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether FSDP2 has sharded it (a DTensor). Duck typing, because DTensor takes 0.7 s to import."""
    return hasattr(tensor, "to_local")


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local shard of a tensor that FSDP2 has sharded, and any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def optimizer_axes(spec: ShardSpec, grid: Grid) -> tuple[Axis, Axis, Axis]:
    """Return the axes (zero, replica, inner) that span the stage as this parameter's optimizer state sees it.

    The state is sharded over zero and replicated over replica; inner shards or
    replicates the weight itself. The gradient is summed over zero and replica, and over
    ``spec.partial``.

        parameter                           zero        replica     inner
        mtp, msp, fsp                       grid.zero   grid.replica  tp
        isp, sharded over wp                grid.zero   grid.replica  wp
        isp, on the tensor axis             grid.dp, all of it or none of it, in zero or in replica; inner tp

    The last row holds embedding, last norm and head. The ranks of the weight view's
    zero axis may hold different tp shards of these, so only the data axis of the
    activation view can shard their state.
    """
    # In isp, zero * replica * wp = dp * tp. So with zero * replica = dp, the axes wp
    # and tp are the same ranks.
    state_ranks = grid.zero.size * grid.replica.size
    views_agree = state_ranks == grid.dp.size
    zero = grid.zero
    replica = grid.replica
    inner = grid.tp

    if not _is_on_tensor_axis(spec, grid):
        wp_is_tp = views_agree and grid.wp.size == 1
        if not wp_is_tp:
            inner = grid.wp
    elif not views_agree:
        # The last row of the table: all of dp shards the state, or none of it.
        if zero.size > 1:
            zero = grid.dp
            replica = Axis("replica")
        else:
            zero = Axis("zero")
            replica = grid.dp
    return zero, replica, inner


def _is_on_tensor_axis(spec: ShardSpec, grid: Grid) -> bool:
    """Return whether the weight itself is sharded or replicated over tp rather than wp."""
    sharding = {axis for axis, _ in spec.shards}
    if "wp" in sharding:
        return False
    # In isp, what wp does not shard is complete on each of its ranks, which see
    # different data.
    uses_tp = "tp" in sharding or "tp" in spec.partial
    return uses_tp or grid.wp.size > 1
