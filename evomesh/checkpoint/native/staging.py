"""Staging buffers: host memory that a background save copies into.

Training waits for one copy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evomesh.checkpoint.native.boxes import Coordinates, LocalPart
from evomesh.checkpoint.native.plan import WriteItem
from evomesh.rounding import next_power_of_two

BLOCK = 2**28  # bytes of pinned memory that are requested at once
ALIGNMENT = 512  # bytes; a multiple of every element size


@dataclass
class _Block:
    """Memory of which the first ``used`` bytes are given away."""

    memory: torch.Tensor
    used: int = 0


class PinnedMemory:
    """Cuts buffers from large blocks.

    torch rounds every request for pinned memory up to a power of two: buffers requested
    one by one would take 1.4 times what they hold.

    Args:
        allocate: returns a block of so many bytes, a power of two.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._blocks: list[_Block] = []

    def empty_like(self, source: torch.Tensor) -> torch.Tensor:
        """Return an uninitialized buffer with shape and dtype of ``source``."""
        size = source.numel() * source.element_size()
        padded = size + -size % ALIGNMENT
        block = self._block_with_room_for(padded)
        flat = block.memory[block.used : block.used + size]
        block.used += padded
        return flat.view(source.dtype).view(source.shape)

    def _block_with_room_for(self, size: int) -> _Block:
        for block in self._blocks:
            room = block.memory.numel() - block.used
            if room >= size:
                return block
        block_size = max(next_power_of_two(size), BLOCK)
        memory = self._allocate(block_size)
        block = _Block(memory)
        self._blocks.append(block)
        return block


def _pin(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class StagingBuffers:
    """Host buffers that are allocated once and used for every save.

    They are pinned if the source is on a GPU.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Coordinates], torch.Tensor] = {}
        self._pinned = PinnedMemory(_pin)

    def prepare(self, items: list[WriteItem]) -> None:
        """Allocate the buffers and touch their pages, so that no save has to."""
        # Memory that was only allocated has no pages yet: the first save would wait for
        # the system to map each of them, and a machine without enough memory would kill
        # the run there and not at its start.
        for item in items:
            self._buffer(item).zero_()

    def copy(self, items: list[WriteItem]) -> list[WriteItem]:
        """Return the same items over copies that stay unchanged until the next call."""
        copies = []
        has_cuda = False
        for item in items:
            tensor = item.part.tensor
            has_cuda = has_cuda or tensor.is_cuda
            buffer = self._buffer(item)
            buffer.copy_(tensor, non_blocking=True)
            part = LocalPart(buffer, item.part.box)
            copies.append(WriteItem(item.name, item.dtype, item.shape, part))
        if has_cuda:
            # The copies are only queued until here: one wait for all of them.
            torch.cuda.current_stream().synchronize()
        return copies

    def _buffer(self, item: WriteItem) -> torch.Tensor:
        part = item.part
        source = part.tensor
        key = (item.name, part.box.offsets)
        buffer = self._buffers.get(key)
        if buffer is None or not _fits(buffer, source):
            # Pageable memory would make ``copy_(non_blocking=True)`` from a GPU wait for
            # each tensor in turn.
            if source.is_cuda:
                buffer = self._pinned.empty_like(source)
            else:
                buffer = torch.empty(source.shape, dtype=source.dtype)
            self._buffers[key] = buffer
        return buffer


def _fits(buffer: torch.Tensor, source: torch.Tensor) -> bool:
    return buffer.shape == source.shape and buffer.dtype == source.dtype
