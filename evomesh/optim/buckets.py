"""Messages of the optimizer: gradients on their way to the rank that owns their rows, and updated rows back.

Parameters cut over an axis of n ranks are packed as [n, chunk], row r holding what rank r owns of each, so that one
reduce-scatter hands every rank its rows of all of them, and one all-gather brings them back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evomesh.optim.slot import ParameterSlot
from evomesh.parallel.collectives import (
    PendingCollective,
    launch_all_gather,
    launch_all_reduce,
    launch_reduce_scatter,
)


@dataclass(eq=False)
class GradientBucket:
    """Gradients summed together: same cut, same axes, same dtype."""

    slots: list[ParameterSlot]
    pending: PendingCollective | None = None
    arrived: int = 0

    def launch(self) -> None:
        """Starts the first sum. The gradients must stay as they are until ``finish``."""
        cut, sums = self.slots[0].shard_axis, self.slots[0].sum_axes
        rows = [slot.gradient().reshape(cut.size, -1) for slot in self.slots]
        bucket = rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, dim=1)
        self.pending = (
            launch_reduce_scatter(bucket, cut) if cut.size > 1 else launch_all_reduce(bucket, sums[0])
        )

    def finish(self) -> None:
        """Completes all sums and gives each target its gradient."""
        if self.pending is None:
            self.launch()
        assert self.pending is not None
        total, self.pending, self.arrived = self.pending.wait(), None, 0
        cut, sums = self.slots[0].shard_axis, self.slots[0].sum_axes
        for axis in sums if cut.size > 1 else sums[1:]:
            total = launch_all_reduce(total, axis).wait()
        pieces = torch.split(total.view(-1), [slot.master.numel() for slot in self.slots])
        for slot, piece in zip(self.slots, pieces, strict=True):
            slot.master.grad = piece.view(slot.master.shape)


class GradientSync:
    """Sums gradients over ranks, bucket by bucket, in the order in which backward finishes them.

    With ``overlap``, and once ``expect`` has said how many micro-batches there are, a bucket sets off as soon as the
    last micro-batch has filled it; otherwise one after the other at the end, at most one at a time in memory.
    """

    def __init__(self, slots: Sequence[ParameterSlot], bucket_size: int, overlap: bool) -> None:
        self.overlap = overlap
        self.local = [slot for slot in slots if slot.shard_axis.size == 1 and not slot.sum_axes]
        synced = [slot for slot in reversed(slots) if slot.shard_axis.size > 1 or slot.sum_axes]
        kinds: dict[object, list[ParameterSlot]] = {}
        for slot in synced:
            kinds.setdefault((slot.shard_axis, slot.sum_axes, slot.gradient_dtype), []).append(slot)
        position = {slot: index for index, slot in enumerate(synced)}
        self.buckets = [
            GradientBucket(part) for kind in kinds.values() for part in pack_into_buckets(kind, bucket_size)
        ]
        self.buckets.sort(key=lambda bucket: position[bucket.slots[-1]])  # by when backward fills them
        self._bucket_of = {slot: bucket for bucket in self.buckets for slot in bucket.slots}
        self._micro_batches = 0
        self._launched = 0

    def expect_micro_batches(self, micro_batches: int) -> None:
        self._micro_batches = micro_batches

    def arrived(self, slot: ParameterSlot) -> None:
        """Notes that a micro-batch's gradient of ``slot`` is there. Buckets leave in the same order on every rank."""
        bucket = self._bucket_of.get(slot)
        if bucket is None or not self.overlap or slot.micro_batches != self._micro_batches:
            return
        bucket.arrived += 1
        while self._launched < len(self.buckets):
            bucket = self.buckets[self._launched]
            if bucket.arrived < len(bucket.slots):
                break
            bucket.launch()
            self._launched += 1

    def finish(self) -> None:
        """Gives every target its gradient, summed over all ranks that hold a part of it."""
        if self.overlap:
            for bucket in self.buckets[self._launched :]:
                bucket.launch()
        for bucket in self.buckets:
            bucket.finish()
        for slot in self.local:
            slot.master.grad = slot.gradient()
        self._launched = self._micro_batches = 0


@dataclass(eq=False)
class ParameterBucket:
    """Updated rows gathered together: same cut, same dtype. A parameter alone is gathered in place."""

    slots: list[ParameterSlot]
    pending: PendingCollective | None = None
    _alone: bool = field(init=False)

    def __post_init__(self) -> None:
        self._alone = len(self.slots) == 1

    def launch(self) -> None:
        cut, dtype = self.slots[0].shard_axis, self.slots[0].local.dtype
        rows = torch.cat(
            [slot.master.reshape(-1).to(dtype) for slot in self.slots]
        )  # also a copy: out must not alias it
        out = self.slots[0].local.view(cut.size, -1) if self._alone else None
        self.pending = launch_all_gather(rows, cut, out)

    def finish(self) -> None:
        if self.pending is None:
            return
        bucket, self.pending = self.pending.wait(), None
        if not self._alone:
            pieces = torch.split(bucket, [slot.master.numel() for slot in self.slots], dim=1)
            for slot, piece in zip(self.slots, pieces, strict=True):
                slot.local.view(slot.shard_axis.size, -1).copy_(piece)


class ParameterSync:
    """Brings updated parameters to all ranks of the axis that cuts their optimizer state.

    Args:
        slots: all parameters, in the order in which forward uses them.
        bucket_size: most elements gathered at once; 0: every parameter travels alone.
        overlap: ``start`` returns with the gathers under way, and ``wait`` must precede each use of a parameter.
    """

    def __init__(self, slots: Sequence[ParameterSlot], bucket_size: int, overlap: bool) -> None:
        self.overlap = overlap
        kinds: dict[object, list[ParameterSlot]] = {}
        for slot in slots:
            if slot.shard_axis.size > 1:
                kinds.setdefault((slot.shard_axis, slot.local.dtype), []).append(slot)
        self.buckets = [
            ParameterBucket(part) for kind in kinds.values() for part in pack_into_buckets(kind, bucket_size)
        ]
        self._bucket_of = {slot.name: bucket for bucket in self.buckets for slot in bucket.slots}

    def start(self) -> None:
        for bucket in self.buckets:
            bucket.launch()
            if not self.overlap:
                bucket.finish()

    def wait(self, names: Iterable[str] | None = None) -> None:
        """Blocks until the named parameters, or all, hold their new values."""
        for bucket in (
            self.buckets if names is None else [self._bucket_of[n] for n in names if n in self._bucket_of]
        ):
            bucket.finish()


def pack_into_buckets(slots: Sequence[ParameterSlot], limit: int) -> list[list[ParameterSlot]]:
    """Consecutive slots in lists of at most ``limit`` elements; a larger one stays whole, alone in its list."""
    parts: list[list[ParameterSlot]] = []
    size = 0
    for slot in slots:
        size += slot.local.numel()
        if not parts or size > limit:
            parts.append([])
            size = slot.local.numel()
        parts[-1].append(slot)
    return parts


def copy_masters_to_parameters(slots: Sequence[ParameterSlot]) -> None:
    """Rounds float32 masters to the parameters that this rank holds whole."""
    halves = [slot for slot in slots if slot.accumulated_grad is not None and slot.shard_axis.size == 1]
    sources: list[Tensor] = [slot.master for slot in halves]
    if halves:
        torch._foreach_copy_([slot.local for slot in halves], sources)
