"""Staging buffers: host memory that a background save copies into.

Training waits for one copy only.
"""

from __future__ import annotations

import torch

from evomesh.checkpoint.native.boxes import Coordinates, LocalPart
from evomesh.checkpoint.native.plan import WriteItem


class StagingBuffers:
    """Host buffers that are allocated once and used for every save.

    They are pinned if the source is on a GPU.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Coordinates], torch.Tensor] = {}

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
            buffer = _new_buffer(source)
            self._buffers[key] = buffer
        return buffer


def _new_buffer(source: torch.Tensor) -> torch.Tensor:
    # Pageable memory would make ``copy_(non_blocking=True)`` from a GPU wait for each
    # tensor in turn.
    is_pinned = source.is_cuda
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=is_pinned)


def _fits(buffer: torch.Tensor, source: torch.Tensor) -> bool:
    return buffer.shape == source.shape and buffer.dtype == source.dtype
