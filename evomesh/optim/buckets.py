"""Buckets of the optimizer: gradients are summed to the rank that owns their rows, and updated rows are gathered.

Parameters whose state is sharded over an axis of n ranks are packed as [n, chunk]: row r holds the rows of each that
rank r owns. So one reduce-scatter gives every rank its rows of all of them, and one all-gather distributes the updated
rows.

What overlap changes, for two buckets (``b1`` is filled first, ``rs`` a reduce-scatter, ``ag`` an all-gather):

    overlap_sync_grad off   backward ......................... | rs b1 | rs b2 | norm, AdamW
    overlap_sync_grad on    backward ...... b1 ........... b2  | wait          | norm, AdamW
                                            └ rs b1 ┄┄┄┄┄┄ └ rs b2 ┄┄┄┄┄┄┄┄┄┄┘

    overlap_sync_param off  AdamW | ag b1 | ag b2 | forward layer 1 | layer 2
    overlap_sync_param on   AdamW | wait b1 | forward layer 1 | wait b2 | layer 2
                                  └ ag b1 ┄┄┘ ag b2 ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┘
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """Gradients summed together: same shard axis, same sum axes, same dtype."""

    slots: list[ParameterSlot]
    pending: PendingCollective | None = None
    ready: int = 0  # slots whose gradient is complete

    def launch(self) -> None:
        """Start the first sum. The gradients must stay unchanged until ``finish``."""
        shard_axis = self.slots[0].shard_axis
        rows = [slot.gradient().reshape(shard_axis.size, -1) for slot in self.slots]
        bucket = rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, dim=1)  # [n, chunk]
        if shard_axis.size > 1:
            self.pending = launch_reduce_scatter(bucket, shard_axis)
        else:
            first_sum_axis = self.slots[0].sum_axes[0]
            self.pending = launch_all_reduce(bucket, first_sum_axis)

    def finish(self) -> None:
        """Complete all sums and give each master its gradient."""
        if self.pending is None:
            self.launch()
        assert self.pending is not None
        total = self.pending.wait()
        self.pending = None
        self.ready = 0

        # The launched collective has summed over the shard axis, or else over the first of the sum axes.
        remaining = self.slots[0].sum_axes
        if self.slots[0].shard_axis.size == 1:
            remaining = remaining[1:]
        for axis in remaining:
            total = launch_all_reduce(total, axis).wait()

        # `total` is this rank's row of the bucket: its rows of one parameter after the other.
        sizes = [slot.master.numel() for slot in self.slots]
        gradients = torch.split(total.view(-1), sizes)
        for slot, gradient in zip(self.slots, gradients, strict=True):
            slot.master.grad = gradient.view(slot.master.shape)


class GradientSync:
    """Sums gradients over ranks, bucket by bucket, in the order in which backward finishes them.

    With ``overlap``, and once ``expect_micro_batches`` was called, a bucket is launched as soon as the last micro-batch
    has filled it; otherwise buckets are summed one after the other at the end, at most one at a time in memory.
    """

    def __init__(self, slots: Sequence[ParameterSlot], bucket_size: int, overlap: bool) -> None:
        self.overlap = overlap
        self.local = [slot for slot in slots if not _needs_sum(slot)]
        self.buckets = _gradient_buckets([slot for slot in reversed(slots) if _needs_sum(slot)], bucket_size)
        self._bucket_of = {slot: bucket for bucket in self.buckets for slot in bucket.slots}
        self._micro_batches = 0
        self._launched = 0

    def expect_micro_batches(self, micro_batches: int) -> None:
        """Set how many gradients of each parameter make up this step."""
        self._micro_batches = micro_batches

    def mark_ready(self, slot: ParameterSlot) -> None:
        """Record that a micro-batch's gradient of ``slot`` is complete. Ranks launch buckets in the same order."""
        bucket = self._bucket_of.get(slot)
        if bucket is None or not self.overlap or slot.micro_batches != self._micro_batches:
            return
        bucket.ready += 1
        while self._launched < len(self.buckets):
            bucket = self.buckets[self._launched]
            if bucket.ready < len(bucket.slots):
                break
            bucket.launch()
            self._launched += 1

    def finish(self) -> None:
        """Give every master its gradient, summed over all ranks that have a summand."""
        if self.overlap:
            for bucket in self.buckets[self._launched :]:
                bucket.launch()
        for bucket in self.buckets:
            bucket.finish()
        for slot in self.local:
            slot.master.grad = slot.gradient()
        self._launched = self._micro_batches = 0


def _needs_sum(slot: ParameterSlot) -> bool:
    return slot.shard_axis.size > 1 or len(slot.sum_axes) > 0


def _gradient_buckets(slots: Sequence[ParameterSlot], bucket_size: int) -> list[GradientBucket]:
    """Pack ``slots``, given in the order of backward, into buckets; return them in the order in which they fill."""
    same_sum: dict[object, list[ParameterSlot]] = {}
    for slot in slots:
        kind = (slot.shard_axis, slot.sum_axes, slot.gradient_dtype)
        same_sum.setdefault(kind, []).append(slot)
    buckets: list[GradientBucket] = []
    for group in same_sum.values():
        buckets += map(GradientBucket, pack_into_buckets(group, bucket_size))
    # A bucket is full when backward reaches the last of its slots.
    position = {slot: index for index, slot in enumerate(slots)}
    return sorted(buckets, key=lambda bucket: position[bucket.slots[-1]])


@dataclass(eq=False)
class ParameterBucket:
    """Updated rows gathered together: same shard axis, same dtype. A single parameter is gathered in place."""

    slots: list[ParameterSlot]
    pending: PendingCollective | None = None

    @property
    def _in_place(self) -> bool:
        return len(self.slots) == 1

    def launch(self) -> None:
        """Start gathering. The rows are sent from a copy, which also rounds them: the output must not alias them."""
        axis = self.slots[0].shard_axis
        dtype = self.slots[0].local.dtype
        rows = torch.cat([slot.master.reshape(-1).to(dtype) for slot in self.slots])  # [chunk]
        out = self.slots[0].local.view(axis.size, -1) if self._in_place else None
        self.pending = launch_all_gather(rows, axis, out)

    def finish(self) -> None:
        """Wait, and copy what was gathered into the parameters."""
        if self.pending is None:
            return
        bucket = self.pending.wait()
        self.pending = None
        if self._in_place:
            return
        sizes = [slot.master.numel() for slot in self.slots]
        columns = torch.split(bucket, sizes, dim=1)  # [n, rows of one parameter that one rank owns]
        for slot, rows in zip(self.slots, columns, strict=True):
            parameter = slot.local.view(slot.shard_axis.size, -1)
            parameter.copy_(rows)


class ParameterSync:
    """Gathers updated parameters on all ranks of the axis that shards their optimizer state.

    Args:
        slots: all parameters, in the order in which forward uses them.
        bucket_size: most elements gathered at once; 0: every parameter is gathered alone.
        overlap: ``start`` returns with the gathers pending, and ``wait`` must precede each use of a parameter.
    """

    def __init__(self, slots: Sequence[ParameterSlot], bucket_size: int, overlap: bool) -> None:
        self.overlap = overlap
        same_gather: dict[object, list[ParameterSlot]] = {}
        for slot in slots:
            if slot.shard_axis.size > 1:
                kind = (slot.shard_axis, slot.local.dtype)
                same_gather.setdefault(kind, []).append(slot)
        self.buckets: list[ParameterBucket] = []
        for group in same_gather.values():
            self.buckets += map(ParameterBucket, pack_into_buckets(group, bucket_size))
        self._bucket_of: dict[str, ParameterBucket] = {}
        for bucket in self.buckets:
            self._bucket_of |= {slot.name: bucket for slot in bucket.slots}

    def start(self) -> None:
        """Launch all gathers; without overlap, finish each before the next."""
        for bucket in self.buckets:
            bucket.launch()
            if not self.overlap:
                bucket.finish()

    def wait(self, names: Iterable[str] | None = None) -> None:
        """Block until the named parameters, or all, hold their new values."""
        buckets = self.buckets
        if names is not None:
            buckets = [self._bucket_of[name] for name in names if name in self._bucket_of]
        for bucket in buckets:
            bucket.finish()


def pack_into_buckets(slots: Sequence[ParameterSlot], limit: int) -> list[list[ParameterSlot]]:
    """Group consecutive slots into lists of at most ``limit`` elements; a larger slot gets a list to itself."""
    packs: list[list[ParameterSlot]] = []
    size = 0
    for slot in slots:
        size += slot.local.numel()
        if not packs or size > limit:
            packs.append([])
            size = slot.local.numel()
        packs[-1].append(slot)
    return packs


def copy_masters_to_parameters(slots: Sequence[ParameterSlot]) -> None:
    """Round float32 masters into the parameters whose state is not sharded."""
    halves = [slot for slot in slots if slot.accumulated_grad is not None and slot.shard_axis.size == 1]
    masters: list[Tensor] = [slot.master for slot in halves]
    if halves:
        torch._foreach_copy_([slot.local for slot in halves], masters)
