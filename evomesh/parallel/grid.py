"""The grid: named axes over one set of ranks, the groups of ranks that work together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One named axis of the grid, as one rank sees it. ``group`` is None iff ``size == 1``."""

    name: str
    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = field(default=None, compare=False)

    def shard(self, whole: range) -> range:
        """Return this rank's part of a range.

        The only rounding rule, that of ``torch.chunk``: a part has the length divided
        by the size, rounded up, so the last ranks may get less or nothing.
        """
        length = -(-len(whole) // self.size)
        start = min(whole.start + self.rank * length, whole.stop)
        return range(start, min(start + length, whole.stop))


@dataclass(frozen=True)
class Grid:
    """Two views of the same ranks; the ranks of the last axis are adjacent.

    The activation view is (pp, dp, tp). The weight view is (pp, replica, zero, wp) in
    isp, and ends in tp elsewhere. ``ends`` belongs to neither: it joins the first and
    the last rank of the pipeline, which both hold a tied embedding.
    """

    pp: Axis = Axis("pp")
    dp: Axis = Axis("dp")
    tp: Axis = Axis("tp")
    wp: Axis = Axis("wp")
    zero: Axis = Axis("zero")
    replica: Axis = Axis("replica")
    ends: Axis = Axis("ends")

    @property
    def shard_axes(self) -> dict[str, Axis]:
        """Return the axes over which parameters may be sharded, by name."""
        return {"tp": self.tp, "wp": self.wp, "zero": self.zero}

    @property
    def axes(self) -> dict[str, Axis]:
        """Return all axes by name."""
        return {axis.name: getattr(self, axis.name) for axis in fields(self)}

    @property
    def is_main(self) -> bool:
        """Return whether this rank speaks for the run: the first of the last stage, which has the loss."""
        is_first = self.dp.rank == 0 and self.tp.rank == 0
        is_last_stage = self.pp.rank == self.pp.size - 1
        return is_first and is_last_stage

    @property
    def world_rank(self) -> int:
        """Return this rank's number among all: the activation view, whose last axis is adjacent."""
        before = self.pp.rank * self.dp.size + self.dp.rank
        return before * self.tp.size + self.tp.rank

    @property
    def world_size(self) -> int:
        return self.pp.size * self.dp.size * self.tp.size
