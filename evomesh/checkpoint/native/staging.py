"""Staging buffers: host memory that a background save copies into, so that training waits for one copy only."""

from __future__ import annotations

import torch

from evomesh.checkpoint.native.boxes import Coordinates, LocalPart
from evomesh.checkpoint.native.plan import WriteItem


class StagingBuffers:
    """Host buffers that are allocated once and used for every save; pinned if the source is on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Coordinates], torch.Tensor] = {}

    def prepare(self, items: list[WriteItem]) -> None:
        """Allocate the buffers and touch their pages, so that the first save does not have to."""
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
        key, source = (item.name, item.part.box.offsets), item.part.tensor
        buffer = self._buffers.get(key)
        if (
            buffer is None
            or buffer.shape != source.shape
            or buffer.dtype != source.dtype
        ):
            buffer = torch.empty(
                source.shape, dtype=source.dtype, pin_memory=source.is_cuda
            )
            self._buffers[key] = buffer
        return buffer
