"""Bytes of a rank's optimizer: its stages' parameters with their states, and the buckets in which they are sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from evomesh.config.schema import ZeroConfig
from evomesh.plan.bucket_time import (
    ReadySlot,
    StateAxes,
    gather_buckets,
    held_bytes,
    sum_buckets,
)
from evomesh.plan.part_trace import SlotShape
from evomesh.plan.stage_parts import StageMakeup


@dataclass(frozen=True)
class RankMakeup:
    """The stages of one rank of a pipeline, and the axes of its optimizer."""

    stages: dict[int, StageMakeup]
    tied: list[SlotShape]
    axes: StateAxes

    def slots(self) -> list[SlotShape]:
        """Return its parameters in the order of forward."""
        backward = [ready.slot for ready in self.in_backward()]
        return backward[::-1]

    @property
    def num_parts(self) -> int:
        """Parts of backward in all stages, and one after them, which completes a tied embedding."""
        return len(list(self._slots_by_part()))

    def in_backward(self, ends: Sequence[float] = ()) -> list[ReadySlot]:
        """Return its parameters in the order of backward.

        Args:
            ends: when each part of backward ends; by default at 0.
        """
        ready = []
        for part, slots in enumerate(self._slots_by_part()):
            time = 0.0
            if part < len(ends):
                time = ends[part]
            for slot in slots:
                one = ReadySlot(slot, part, time)
                ready.append(one)
        return ready

    def _slots_by_part(self) -> Iterator[list[SlotShape]]:
        """Yield the parameters of each part of backward, then a tied embedding."""
        stages = list(self.stages.values())
        for stage in reversed(stages):
            yield from stage.slots_in_backward()
        yield self.tied


@dataclass(frozen=True)
class RankState:
    """Bytes of a rank's optimizer.

    Attributes:
        held: by kind, during the whole step.
        sums_after: of the sums that were launched up to the end of each part of backward, where they overlap with it.
        overlap: whether they do.
        update: of all sums, and of what the update gathers.
    """

    held: dict[str, int]
    sums_after: list[int]
    overlap: bool
    update: int

    def sums_in(self, part: int) -> int:
        """Return the bytes of sums that are there in a part of backward."""
        return self.sums_after[part] if self.overlap else 0

    @classmethod
    def of(cls, makeup: RankMakeup, zero: ZeroConfig) -> RankState:
        axes = makeup.axes
        slots = makeup.slots()
        launched = [0] * makeup.num_parts
        ready = makeup.in_backward()
        buckets = sum_buckets(ready, axes, zero.reduce_bucket_size)
        for bucket in buckets:
            launched[bucket.full_in] += bucket.result
        gathers = gather_buckets(slots, axes, zero)
        sizes = [bucket.peak for bucket in gathers]
        gathering = max(sizes, default=0)
        if zero.overlap_sync_param:
            gathering = sum(sizes)
        return cls(
            held=held_bytes(slots, axes),
            sums_after=list(accumulate(launched)),
            overlap=zero.overlap_sync_grad,
            update=sum(launched) + gathering,
        )
