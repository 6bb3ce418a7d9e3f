"""Kept host buffers: the training step waits for one copy of what its rank owns, and for nothing else."""

from __future__ import annotations

import torch

from evomesh.checkpoint.native.boxes import Coordinates, LocalPart
from evomesh.checkpoint.native.plan import WriteItem


class StagingBuffers:
    """Copies entries into buffers that are made once and used for every save (pinned when the source is on a GPU)."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Coordinates], torch.Tensor] = {}

    def prepare(self, entries: list[WriteItem]) -> None:
        """Makes the buffers and touches their pages, so that the first save does not pay for that."""
        for entry in entries:
            self._buffer(entry).zero_()

    def copy(self, entries: list[WriteItem]) -> list[WriteItem]:
        """The same entries over copies that nobody changes until the next call."""
        copies = []
        for entry in entries:
            buffer = self._buffer(entry)
            buffer.copy_(entry.part.tensor, non_blocking=True)
            copies.append(WriteItem(entry.name, entry.dtype, entry.shape, LocalPart(buffer, entry.part.box)))
        if any(entry.part.tensor.is_cuda for entry in entries):
            torch.cuda.current_stream().synchronize()
        return copies

    def _buffer(self, entry: WriteItem) -> torch.Tensor:
        key, source = (entry.name, entry.part.box.offsets), entry.part.tensor
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = buffer
        return buffer
