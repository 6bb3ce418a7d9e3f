"""From sizes to process groups: which ranks form which axis, and the groups for the axes this rank is on.

The order of ranks is InternEvo's: a stage is a contiguous block of ranks, inside it the tensor (or weight) axis holds
neighbours, and the zero axis holds consecutive members of what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch.distributed as dist

from evomesh.config.layout import AxisSizes, axis_sizes
from evomesh.config.schema import ParallelConfig
from evomesh.parallel.grid import Axis, Grid

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def axis_members(sizes: AxisSizes, rank: int) -> dict[str, list[int]]:
    """The global ranks on each axis through ``rank``, in axis order."""
    first = rank - rank % sizes.ranks_per_stage  # first rank of this stage
    inner = sizes.wp if sizes.isp else sizes.tp  # neighbours that hold different parts of the weights
    local = rank - first
    group_of_zero = local - local % (sizes.zero * inner)
    return {
        "pp": [local + stage * sizes.ranks_per_stage for stage in range(sizes.pp)],
        "dp": [first + local % sizes.tp + i * sizes.tp for i in range(sizes.dp)],
        "tp": [rank - local % sizes.tp + i for i in range(sizes.tp)],
        "wp": [rank - local % sizes.wp + i for i in range(sizes.wp)],
        "zero": [first + group_of_zero + local % inner + i * inner for i in range(sizes.zero)],
        "replica": [
            first + local % (sizes.zero * inner) + i * sizes.zero * inner for i in range(sizes.replica)
        ],
    }


def build_grid(parallel: ParallelConfig, world_size: int, rank: int) -> Grid:
    """Makes the process groups of every axis longer than one; the default group must exist if there is any.

    Every rank of the world has to call it, in the same order relative to other calls.
    """
    groups: dict[tuple[int, ...], ProcessGroup] = {}  # equal axes of the two views share one communicator

    def axis(name: str, members: list[int]) -> Axis:
        if len(members) == 1:
            return Axis(name)
        key = tuple(members)
        if key not in groups:
            # Only members take part in making it: no barrier of the whole world for each of many groups.
            groups[key] = dist.new_group(members, use_local_synchronization=True)
        return Axis(name, len(members), members.index(rank), groups[key])

    members = axis_members(axis_sizes(parallel, world_size), rank)
    return Grid(**{name: axis(name, ranks) for name, ranks in members.items()})


class SharedStore(Protocol):
    """What is needed of torch's stores: one atomic operation on a key that all ranks see."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Writes ``desired`` where the value is ``expected`` ("" for none yet); returns the value afterwards."""


def shared_store() -> SharedStore | None:
    """The key-value store through which the ranks met; None for a process alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    # torch has no public name for it; making a second one would need another port.
    store: SharedStore = dist.distributed_c10d._get_default_store()
    return store
