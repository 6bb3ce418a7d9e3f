"""Grid construction: which ranks form which axis, and a process group for each axis this rank is on.

Ranks are ordered as in InternEvo: a pipeline stage is a contiguous block of ranks.
Inside it, the tensor (or weight) axis groups adjacent ranks, and the zero axis groups
the nearest ranks among those that hold the same weight shard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch.distributed as dist

from evomesh.config.layout import AxisSizes, axis_sizes
from evomesh.config.schema import ParallelConfig
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.process_group import device_backend

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def axis_members(sizes: AxisSizes, rank: int) -> dict[str, list[int]]:
    """Return the global ranks on each axis through ``rank``, in axis order."""
    # Adjacent ranks that hold different shards of the weights.
    weight_shards = sizes.tp
    if sizes.isp:
        weight_shards = sizes.wp
    # Adjacent ranks that hold one copy of the optimizer state.
    zero_block = sizes.zero * weight_shards

    # An axis is an arithmetic sequence of ranks: (distance of neighbors, size).
    axes = {
        "pp": (sizes.ranks_per_stage, sizes.pp),
        "dp": (sizes.tp, sizes.dp),
        "tp": (1, sizes.tp),
        "wp": (1, sizes.wp),
        "zero": (weight_shards, sizes.zero),
        "replica": (zero_block, sizes.replica),
    }
    members = {}
    for name, (distance, size) in axes.items():
        members[name] = _members_through(rank, distance, size)
    return members


def _members_through(rank: int, distance: int, size: int) -> list[int]:
    """Return the ranks of one axis, of which ``rank`` is one.

    Blocks of distance * size ranks hold one axis beside the other: with distance 2 and
    size 3, ranks 6 to 11 are the axes 6, 8, 10 and 7, 9, 11.
    """
    rank_on_axis = rank // distance % size
    first = rank - rank_on_axis * distance
    return [first + i * distance for i in range(size)]


def pipeline_ends(sizes: AxisSizes, rank: int) -> list[int]:
    """Return the first and the last rank of the pipeline through ``rank``; between them: only ``rank``."""
    pipeline = axis_members(sizes, rank)["pp"]
    ends = [pipeline[0], pipeline[-1]]
    return ends if sizes.pp > 1 and rank in ends else [rank]


def build_grid(parallel: ParallelConfig, world_size: int, rank: int) -> Grid:
    """Create a process group for every axis of size > 1, in which case the default group must exist.

    Every rank of the world must call this, in the same order relative to other
    collective calls.
    """
    groups: dict[
        tuple[int, ...], ProcessGroup
    ] = {}  # equal axes of the two views share one communicator

    def group_of(members: list[int]) -> ProcessGroup:
        key = tuple(members)
        if key not in groups:
            on_device_only = members != members_of["dp"]
            # Only the members synchronize, so that a large world has no barrier for
            # each of its many groups.
            groups[key] = dist.new_group(
                members,
                backend=device_backend() if on_device_only else None,
                timeout=parallel.collective_timeout,
                use_local_synchronization=True,
            )
        return groups[key]

    def axis(name: str, members: list[int]) -> Axis:
        if len(members) == 1:
            return Axis(name)
        return Axis(name, len(members), members.index(rank), group_of(members))

    # Data-parallel ranks also send each other counts and objects from the host; all
    # other axes carry device tensors.
    sizes = axis_sizes(parallel, world_size)
    members_of = axis_members(sizes, rank)
    members_of["ends"] = pipeline_ends(sizes, rank)
    axes = {}
    for name, members in members_of.items():
        axes[name] = axis(name, members)
    if sizes.pp > 2 and axes["ends"].size == 1:
        # Stages between the ends. From 2.15 on torch names later groups of all ranks by
        # how many groups a rank has made: ranks that disagree would wait for each other
        # forever.
        group_of([rank])
    return Grid(**axes)


class SharedStore(Protocol):
    """The part of torch's key-value stores that evomesh uses: one atomic operation on a key shared by all ranks."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set ``key`` to ``desired`` if its value is ``expected`` ("": not set yet); return its value afterwards."""


def shared_store() -> SharedStore | None:
    """Return the key-value store that the ranks used to rendezvous; None for a single process."""
    if (
        not dist.is_available()
        or not dist.is_initialized()
        or dist.get_world_size() == 1
    ):
        return None
    # torch has no public accessor for it, and a second store would need another port.
    store: SharedStore = dist.distributed_c10d._get_default_store()
    return store
