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
    all_gather_bucket,
    all_reduce_bucket,
    reduce_scatter_bucket,
)


@dataclass(eq=False)
class GradientBucket:
    """Gradients summed together: same cut, same axes, same dtype."""

    slots: list[ParameterSlot]
    pending: PendingCollective | None = None
    arrived: int = 0

    def launch(self) -> None:
        """Starts the first sum. The gradients must stay as they are until ``finish``."""
        cut, sums = self.slots[0].cut, self.slots[0].sums
        rows = [slot.gradient().reshape(cut.size, -1) for slot in self.slots]
        bucket = rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, dim=1)
        self.pending = (
            reduce_scatter_bucket(bucket, cut) if cut.size > 1 else all_reduce_bucket(bucket, sums[0])
        )

    def finish(self) -> None:
        """Completes all sums and gives each target its gradient."""
        if self.pending is None:
            self.launch()
        assert self.pending is not None
        total, self.pending, self.arrived = self.pending.wait(), None, 0
        cut, sums = self.slots[0].cut, self.slots[0].sums
        for axis in sums if cut.size > 1 else sums[1:]:
            total = all_reduce_bucket(total, axis).wait()
        pieces = torch.split(total.view(-1), [slot.target.numel() for slot in self.slots])
        for slot, piece in zip(self.slots, pieces, strict=True):
            slot.target.grad = piece.view(slot.target.shape)


class GradientSync:
    """Sums gradients over ranks, bucket by bucket, in the order in which backward finishes them.

    With ``overlap``, and once ``expect`` has said how many micro-batches there are, a bucket sets off as soon as the
    last micro-batch has filled it; otherwise one after the other at the end, at most one at a time in memory.
    """

    def __init__(self, slots: Sequence[ParameterSlot], bucket_size: int, overlap: bool) -> None:
        self.overlap = overlap
        self.local = [slot for slot in slots if slot.cut.size == 1 and not slot.sums]
        synced = [slot for slot in reversed(slots) if slot.cut.size > 1 or slot.sums]
        kinds: dict[object, list[ParameterSlot]] = {}
        for slot in synced:
            kinds.setdefault((slot.cut, slot.sums, slot.gradient_dtype), []).append(slot)
        position = {slot: index for index, slot in enumerate(synced)}
        self.buckets = [GradientBucket(part) for kind in kinds.values() for part in packed(kind, bucket_size)]
        self.buckets.sort(key=lambda bucket: position[bucket.slots[-1]])  # by when backward fills them
        self._bucket_of = {slot: bucket for bucket in self.buckets for slot in bucket.slots}
        self._micro_batches = 0
        self._launched = 0

    def expect(self, micro_batches: int) -> None:
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
            slot.target.grad = slot.gradient()
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
        cut, dtype = self.slots[0].cut, self.slots[0].local.dtype
        rows = torch.cat(
            [slot.target.reshape(-1).to(dtype) for slot in self.slots]
        )  # also a copy: out must not alias it
        out = self.slots[0].local.view(cut.size, -1) if self._alone else None
        self.pending = all_gather_bucket(rows, cut, out)

    def finish(self) -> None:
        if self.pending is None:
            return
        bucket, self.pending = self.pending.wait(), None
        if not self._alone:
            pieces = torch.split(bucket, [slot.target.numel() for slot in self.slots], dim=1)
            for slot, piece in zip(self.slots, pieces, strict=True):
                slot.local.view(slot.cut.size, -1).copy_(piece)


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
            if slot.cut.size > 1:
                kinds.setdefault((slot.cut, slot.local.dtype), []).append(slot)
        self.buckets = [
            ParameterBucket(part) for kind in kinds.values() for part in packed(kind, bucket_size)
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


def packed(slots: Sequence[ParameterSlot], limit: int) -> list[list[ParameterSlot]]:
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


def copy_back(slots: Sequence[ParameterSlot]) -> None:
    """Rounds float32 masters to the parameters that this rank holds whole."""
    halves = [slot for slot in slots if slot.accumulated is not None and slot.cut.size == 1]
    sources: list[Tensor] = [slot.target for slot in halves]
    if halves:
        torch._foreach_copy_([slot.local for slot in halves], sources)
