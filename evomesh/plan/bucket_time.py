"""The end of a step by arithmetic: buckets of gradients as backward fills them, the update, gathers of parameters.

The buckets are packed as ``optim/buckets.py`` packs them. Each is sent when it is full
(``overlap_sync_grad``), or at the end; a communicator carries out one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from evomesh.config.schema import ZeroConfig
from evomesh.optim.buckets import DEVICE_GATHER_ELEMENTS
from evomesh.plan.device import Device
from evomesh.plan.part_time import TransferSeconds
from evomesh.plan.part_trace import SlotShape


class ReadySlot(NamedTuple):
    """A parameter, the part of backward that completes its gradient, and when that part ends."""

    slot: SlotShape
    part: int
    time: float


@dataclass(frozen=True)
class StateAxes:
    """Axes of a stage as the optimizer sees them; see ``optimizer_axes``.

    Attributes:
        views_agree: the ranks that hold the same shard of the weights are those with other data.
    """

    zero: int
    replica: int
    data: int
    views_agree: bool

    def shard_axis(self, slot: SlotShape) -> tuple[str, int]:
        """Return the axis over which the state of a parameter is sharded beyond its weight, and its size."""
        name, size = self._zero_of(slot)
        if slot.is_scattered or not slot.is_matrix or slot.rows % size:
            return name, 1
        return name, size

    def sums(self, slot: SlotShape) -> tuple[str, ...]:
        """Return the axes over which its gradient is summed by an all-reduce."""
        axes = []
        name, size = self._zero_of(slot)
        _, shares = self.shard_axis(slot)
        if size > 1 and shares == 1 and not slot.is_scattered:
            axes.append(name)
        if self._is_on_data_axis(slot):
            if self.zero == 1:
                axes.append("dp")
        elif self.replica > 1:
            axes.append("replica")
        if slot.is_summed_inside:
            axes.append(slot.inner)
        return tuple(axes)

    def empty_bucket(self, slot: SlotShape) -> SumBucket:
        """Return a bucket for gradients like that of a parameter."""
        axis, shares = self.shard_axis(slot)
        return SumBucket(axis, shares, self.sums(slot), slot.gradient)

    def _zero_of(self, slot: SlotShape) -> tuple[str, int]:
        if self._is_on_data_axis(slot):
            return "dp", self.data if self.zero > 1 else 1
        return "zero", self.zero

    def _is_on_data_axis(self, slot: SlotShape) -> bool:
        return slot.inner == "tp" and not self.views_agree and self.data > 1


@dataclass
class SumBucket:
    """Gradients that are summed together.

    Attributes:
        axis, shares: of the reduce-scatter; 1 rank: none.
        sums: axes of the all-reduces after it.
        gradient: bytes of an element.
        full_in: the part of backward that fills it, and when.
        last: position of its last gradient in the order of backward.
    """

    axis: str
    shares: int
    sums: tuple[str, ...]
    gradient: int
    elements: int = 0
    full_in: int = 0
    full_at: float = 0.0
    last: int = 0

    @property
    def nbytes(self) -> int:
        return self.elements * self.gradient

    @property
    def result(self) -> int:
        """Bytes that the reduce-scatter adds; other sums are in place."""
        return self.nbytes // self.shares if self.shares > 1 else 0

    @property
    def is_needless(self) -> bool:
        """Return whether one rank alone has the gradients."""
        return self.shares == 1 and not self.sums

    def has_room(self, slot: SlotShape, limit: int) -> bool:
        return self.elements + slot.elements <= limit

    def add(self, ready: ReadySlot, position: int) -> None:
        self.elements += ready.slot.elements
        self.full_in = ready.part
        self.full_at = ready.time
        self.last = position


def sum_buckets(
    ready: Sequence[ReadySlot], axes: StateAxes, limit: int
) -> list[SumBucket]:
    """Pack gradients into buckets, in the order in which these fill.

    Args:
        ready: in the order of backward.
        limit: most elements of a bucket with more than one parameter.
    """
    by_kind: dict[object, list[SumBucket]] = {}
    for position, one in enumerate(ready):
        slot = one.slot
        empty = axes.empty_bucket(slot)
        if empty.is_needless:
            continue
        kind = (
            empty.axis,
            empty.shares,
            empty.sums,
            empty.gradient,
            slot.is_split,
        )
        buckets = by_kind.setdefault(kind, [])
        if not buckets or not buckets[-1].has_room(slot, limit):
            buckets.append(empty)
        buckets[-1].add(one, position)
    found: list[SumBucket] = []
    for buckets in by_kind.values():
        found += buckets
    return sorted(found, key=lambda bucket: bucket.last)


def sums_end(
    buckets: Sequence[SumBucket],
    backward_end: float,
    overlap: bool,
    transfer_seconds: TransferSeconds,
) -> float:
    """Return when the last sum has ended, at least ``backward_end``."""
    communicators = _Communicators(transfer_seconds)
    end = backward_end
    launched = 0.0
    for bucket in buckets:
        # They are launched in this order on every rank; without overlap each waits for
        # the one before.
        launched = max(launched, bucket.full_at if overlap else end)
        done = launched
        nbytes = bucket.nbytes
        if bucket.shares > 1:
            done = communicators.send("reduce_scatter", bucket.axis, nbytes, done)
            nbytes //= bucket.shares
        for axis in bucket.sums:
            done = communicators.send("all_reduce", axis, nbytes, done)
        end = max(end, done)
    return end


@dataclass
class _Communicators:
    """Ends of the transfers of each communicator."""

    transfer_seconds: TransferSeconds
    ends: dict[tuple[str, str], float] = field(default_factory=dict)

    def send(self, operation: str, axis: str, nbytes: int, now: float) -> float:
        key = (operation, axis)
        start = max(now, self.ends.get(key, 0.0))
        end = start + self.transfer_seconds(operation, axis, nbytes)
        self.ends[key] = end
        return end


@dataclass(frozen=True)
class GatherBucket:
    """Parameters that are gathered together after the update."""

    axis: str
    elements: int
    itemsize: int
    shares: int
    slots: int

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize

    def with_slot(self, slot: SlotShape) -> GatherBucket:
        elements = self.elements + slot.elements
        return replace(self, elements=elements, slots=self.slots + 1)

    @property
    def peak(self) -> int:
        """Bytes of the rounded rows, of the message, and of what arrives."""
        rows = self.nbytes // self.shares
        arriving = self.nbytes if self.slots > 1 else 0
        return rows + max(rows, arriving)

    def seconds(self, device: Device, transfer_seconds: TransferSeconds) -> float:
        """Return the time of rounding the masters, gathering, and copying into the parameters."""
        gathered = transfer_seconds("all_gather", self.axis, self.nbytes)
        # A float32 master is read and a parameter written; rows are read and written.
        rows = self.elements // self.shares * (4 + 3 * self.itemsize)
        copied = 2 * self.nbytes if self.slots > 1 else 0
        return gathered + device.memory_seconds(rows + copied)


def gather_buckets(
    slots: Sequence[SlotShape], axes: StateAxes, zero: ZeroConfig
) -> list[GatherBucket]:
    """Pack the parameters with a sharded state, given in the order of forward, into gathers."""
    limit = DEVICE_GATHER_ELEMENTS
    if zero.use_split_tensor_optim:
        limit = zero.all_gather_size
    by_kind: dict[object, list[GatherBucket]] = {}
    for slot in slots:
        axis, shares = axes.shard_axis(slot)
        if shares == 1:
            continue
        packed = by_kind.setdefault((axis, slot.itemsize), [])
        one = GatherBucket(axis, slot.elements, slot.itemsize, shares, 1)
        last = packed[-1] if packed else None
        if last is None or last.elements + one.elements > limit:
            packed.append(one)
        else:
            packed[-1] = last.with_slot(slot)
    return [bucket for packed in by_kind.values() for bucket in packed]


def held_bytes(slots: Sequence[SlotShape], axes: StateAxes) -> dict[str, int]:
    """Return the bytes by kind that a rank holds during the whole step for these parameters."""
    weights = 0
    gradients = 0
    masters = 0
    moments = 0
    for slot in slots:
        _, shares = axes.shard_axis(slot)
        gradient = slot.elements * slot.gradient
        weights += slot.elements * slot.itemsize
        gradients += gradient
        if slot.is_half:
            masters += gradient // shares
        moments += slot.moments // shares
    return {
        "weights": weights,
        "gradients": gradients,
        "masters": masters,
        "moments": moments,
    }


def update_seconds(held: dict[str, int], device: Device) -> float:
    """Return the time of the update: it reads and writes masters and moments, and reads as many gradients."""
    masters = held["masters"]
    state = masters + held["moments"]
    return device.memory_seconds(2 * state + masters)
