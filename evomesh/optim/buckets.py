"""Buckets of the optimizer: gradients are summed to the rank that owns their rows, and updated rows are gathered.

Parameters whose state is sharded over an axis of n ranks are packed as [n, chunk]: row
r holds the rows of each that rank r owns. So one reduce-scatter gives every rank its
rows of all of them, and one all-gather distributes the updated rows.

What overlap changes, for two buckets (``b1`` is filled first, ``rs`` a reduce-scatter,
``ag`` an all-gather):

    overlap_sync_grad off   backward ......................... | rs b1 | rs b2 | norm, AdamW
    overlap_sync_grad on    backward ...... b1 ........... b2  | wait          | norm, AdamW
                                            └ rs b1 ┄┄┄┄┄┄ └ rs b2 ┄┄┄┄┄┄┄┄┄┄┘

    overlap_sync_param off  AdamW | ag b1 | ag b2 | forward layer 1 | layer 2
    overlap_sync_param on   AdamW | wait b1 | forward layer 1 | wait b2 | layer 2
                                  └ ag b1 ┄┄┘ ag b2 ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┘
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evomesh.config.schema import ZeroConfig
from evomesh.optim.slot import ParameterSlot
from evomesh.parallel.collectives import (
    PendingCollective,
    launch_all_gather,
    launch_all_reduce,
    launch_next_sum,
    launch_reduce_scatter,
)
from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import is_sharded


@dataclass(eq=False)
class GradientBucket:
    """Gradients summed together: same shard axis, same sum axes, same dtype, all or none sharded by FSDP2.

    Attributes:
        accumulators: [n, chunk], where float32 gradients of 16-bit parameters accumulate and from where they are sent;
            None for other dtypes, whose gradients are copied into a message and freed.
        ready: slots whose gradient is complete.
        completions: events on the streams that completed them.
        unlaunched: axes over which the result of ``pending`` is still a partial sum.
    """

    slots: list[ParameterSlot]
    accumulators: Tensor | None = field(init=False)
    pending: PendingCollective | None = None
    ready: int = 0
    completions: list[torch.Event] = field(default_factory=list)
    unlaunched: list[Axis] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accumulators = allocate_accumulators(self.slots)

    @property
    def is_full(self) -> bool:
        return self.ready == len(self.slots)

    def count_ready(self) -> None:
        """Count a slot whose gradient the current stream has completed."""
        self.ready += 1
        completion = record_event(self.slots[0].local.device)
        if completion is not None:
            self.completions.append(completion)

    def launch(self, stream: torch.Stream | None = None) -> None:
        """Start the sums; the gradients are consumed. On the CPU only the first, since the next needs its result.

        Args:
            stream: where a CUDA device waits for one sum before it starts the next.
        """
        # FSDP2 calls its parameters' hooks on a separate stream, autograd the others'
        # on that of the forward.
        for completion in self.completions:
            completion.wait()
        self.completions.clear()
        message = self._message()
        # All parameters of a bucket are summed over the same axes.
        first_slot = self.slots[0]
        shard_axis = first_slot.shard_axis
        sum_axes = list(first_slot.sum_axes)
        if shard_axis.size > 1:
            self.pending = launch_reduce_scatter(message, shard_axis)
        else:
            self.pending = launch_all_reduce(message, sum_axes.pop(0))
        # Between nodes the sum over replicas takes longer than that inside a node: it
        # has to overlap with backward too.
        self.unlaunched = sum_axes
        while self.unlaunched and not message.is_cpu:
            axis = self.unlaunched.pop(0)
            self.pending = launch_next_sum(self.pending, axis, stream)

    def _message(self) -> Tensor:
        """Return all gradients as [n, chunk]. Nothing else holds a copy of them from here on."""
        rows = [slot.gradient_rows() for slot in self.slots]
        if self.accumulators is not None:
            return self.accumulators
        for slot in self.slots:
            slot.param.grad = None
        if len(rows) == 1:
            return rows[0].contiguous()
        return torch.cat(rows, dim=1)

    def finish(self) -> None:
        """Complete all sums and give each master its gradient."""
        if self.pending is None:
            self.launch()
        assert self.pending is not None
        total = self.pending.wait()
        self.pending = None
        self.ready = 0

        for axis in self.unlaunched:
            total = launch_all_reduce(total, axis).wait()
        self._give_to_masters(total)

    def _give_to_masters(self, total: Tensor) -> None:
        """Give each master its part of this rank's row of the bucket: its rows of one parameter after the other."""
        masters = [slot.master for slot in self.slots]
        sizes = [master.numel() for master in masters]
        gradients = torch.split(total.view(-1), sizes)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.view(master.shape)


class GradientSync:
    """Sums gradients over ranks, bucket by bucket, in the order in which backward finishes them.

    With ``overlap``, and once ``expect_micro_batches`` was called, a bucket is launched
    as soon as the last micro-batch has filled it; otherwise buckets are summed one
    after the other at the end, at most one at a time in memory.
    """

    def __init__(
        self, slots: Sequence[ParameterSlot], bucket_size: int, overlap: bool
    ) -> None:
        self.overlap = overlap
        self.local = [slot for slot in slots if not _needs_sum(slot)]
        for slot in self.local:
            allocate_accumulators([slot])
        self.buckets = _gradient_buckets(
            [slot for slot in reversed(slots) if _needs_sum(slot)], bucket_size
        )
        self._bucket_of = {
            slot: bucket for bucket in self.buckets for slot in bucket.slots
        }
        self._micro_batches = 0
        self._launched = 0
        self._stream = None
        if slots and slots[0].local.is_cuda:
            self._stream = torch.Stream(slots[0].local.device)

    def expect_micro_batches(self, micro_batches: int) -> None:
        """Set how many gradients of each parameter make up this step."""
        self._micro_batches = micro_batches

    def mark_ready(self, slot: ParameterSlot) -> None:
        """Record that a micro-batch's gradient of ``slot`` is complete. Ranks launch buckets in the same order."""
        bucket = self._bucket_of.get(slot)
        if (
            bucket is None
            or not self.overlap
            or slot.backwards != slot.uses * self._micro_batches
        ):
            return
        bucket.count_ready()
        while (
            self._launched < len(self.buckets) and self.buckets[self._launched].is_full
        ):
            self.buckets[self._launched].launch(self._stream)
            self._launched += 1

    def finish(self) -> None:
        """Give every master its gradient, summed over all ranks that have a summand."""
        if self.overlap:
            for bucket in self.buckets[self._launched :]:
                bucket.launch(self._stream)
        for bucket in self.buckets:
            bucket.finish()
        for slot in self.local:
            gradient = slot.gradient_rows()
            slot.master.grad = gradient.view(slot.master.shape)
        self._launched = 0
        self._micro_batches = 0


def allocate_accumulators(slots: Sequence[ParameterSlot]) -> Tensor | None:
    """Let gradients of 16-bit parameters accumulate side by side, as [n, chunk], so that nothing is copied to be sent.

    Returns:
        the memory of all of them, of which each slot gets its columns; None for other dtypes.
    """
    first = slots[0]
    if not first.is_half:
        return None
    sizes = [slot.local.numel() // first.shard_axis.size for slot in slots]
    memory = torch.empty(
        first.shard_axis.size,
        sum(sizes),
        dtype=torch.float32,
        device=first.local.device,
    )
    columns_by_slot = torch.split(memory, sizes, dim=1)
    for slot, columns in zip(slots, columns_by_slot, strict=True):
        slot.accumulated_grad = columns
    return memory


def record_event(device: torch.device) -> torch.Event | None:
    """Mark how far the current stream of a CUDA device has come; ``wait`` lets the current stream wait for it."""
    if device.type != "cuda":
        return None
    event = torch.Event(device)
    event.record()
    return event


def _needs_sum(slot: ParameterSlot) -> bool:
    return slot.shard_axis.size > 1 or len(slot.sum_axes) > 0


def _gradient_buckets(
    slots: Sequence[ParameterSlot], bucket_size: int
) -> list[GradientBucket]:
    """Pack ``slots``, given in the order of backward, into buckets; return them in the order in which they fill."""
    same_sum: dict[object, list[ParameterSlot]] = {}
    for slot in slots:
        kind = (
            slot.shard_axis,
            slot.sum_axes,
            slot.gradient_dtype,
            is_sharded(slot.param),
        )
        same_sum.setdefault(kind, []).append(slot)
    buckets: list[GradientBucket] = []
    for group in same_sum.values():
        packs = pack_into_buckets(group, bucket_size)
        buckets += map(GradientBucket, packs)
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
        first = self.slots[0]
        axis = first.shard_axis
        dtype = first.local.dtype
        # [chunk]
        rows = torch.cat([slot.master.reshape(-1).to(dtype) for slot in self.slots])
        out = first.local.view(axis.size, -1) if self._in_place else None
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
        # [n, rows of one parameter that one rank owns]
        columns = torch.split(bucket, sizes, dim=1)
        for slot, rows in zip(self.slots, columns, strict=True):
            parameter = slot.local.view(slot.shard_axis.size, -1)
            parameter.copy_(rows)


def _by_gather(slots: Sequence[ParameterSlot]) -> Iterable[list[ParameterSlot]]:
    """Return the slots with a sharded state, in groups of one axis and dtype: a bucket is one collective."""
    groups: dict[object, list[ParameterSlot]] = {}
    for slot in slots:
        if slot.shard_axis.size > 1:
            kind = (slot.shard_axis, slot.local.dtype)
            groups.setdefault(kind, []).append(slot)
    return groups.values()


# Elements of one gather on a device: 256 MiB in 16 bits, enough to use the whole
# bandwidth, and 66 messages of a 7B model instead of 162.
DEVICE_GATHER_ELEMENTS = 2**27


def gather_bucket_size(zero: ZeroConfig, device: torch.device) -> int:
    """Return the most elements gathered at once, 0 for each parameter alone; no value changes a result.

    A device never gathers parameter by parameter: a vector costs it as much time as
    megabytes do.
    """
    if zero.use_split_tensor_optim:
        return zero.all_gather_size
    return 0 if device.type == "cpu" else DEVICE_GATHER_ELEMENTS


class ParameterSync:
    """Gathers updated parameters on all ranks of the axis that shards their optimizer state.

    Args:
        slots: all parameters, in the order in which forward uses them.
        bucket_size: most elements gathered at once; 0: every parameter is gathered alone.
        overlap: ``start`` returns with the gathers pending, and ``wait`` must precede each use of a parameter.
    """

    def __init__(
        self, slots: Sequence[ParameterSlot], bucket_size: int, overlap: bool
    ) -> None:
        self.overlap = overlap
        self.buckets: list[ParameterBucket] = []
        for alike in _by_gather(slots):
            for pack in pack_into_buckets(alike, bucket_size):
                bucket = ParameterBucket(pack)
                self.buckets.append(bucket)
        self._bucket_of: dict[str, ParameterBucket] = {}
        for bucket in self.buckets:
            for slot in bucket.slots:
                self._bucket_of[slot.name] = bucket

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
            buckets = [
                self._bucket_of[name] for name in names if name in self._bucket_of
            ]
        for bucket in buckets:
            bucket.finish()


def pack_into_buckets(
    slots: Sequence[ParameterSlot], limit: int
) -> list[list[ParameterSlot]]:
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
    halves = [slot for slot in slots if slot.is_half and slot.shard_axis.size == 1]
    masters: list[Tensor] = [slot.master for slot in halves]
    if halves:
        torch._foreach_copy_([slot.local for slot in halves], masters)
