"""Read the tensors of a checkpoint as the headers of its data files name them, without the index.

A start or an export reads by ``index.jsonl``. What it read is compared with this: the
same bytes, found by the names and shapes that the safetensors files give themselves. A
mistake in the index, or in its reader, is then a difference and no common error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.checkpoint.huggingface.files import SafetensorsFile
from evomesh.checkpoint.native.boxes import Box, Coordinates
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.storage.base import join


@dataclass(frozen=True)
class _StoredBox:
    """A part of a tensor: where it is in the whole, and the file and key that hold it."""

    offsets: Coordinates
    shape: Coordinates
    file: SafetensorsFile
    key: str


class DataFiles:
    """All tensors in the data files of a checkpoint."""

    def __init__(self, found: Checkpoint) -> None:
        self._where = found.folder
        self._boxes: dict[str, list[_StoredBox]] = {}
        for record in found.files:
            file = SafetensorsFile(found.storage, join(found.folder, record.name))
            for key, shape in file.shapes.items():
                # A part of a tensor has the key NAME@first,element.
                name, _, first = key.partition("@")
                offsets = (0,) * len(shape)
                if first:
                    offsets = tuple(map(int, first.split(",")))
                box = _StoredBox(offsets, shape, file, key)
                self._boxes.setdefault(name, []).append(box)

    def read(self, name: str) -> Tensor:
        """Read a whole tensor.

        Raises:
            CheckpointError: no file holds it, or its parts overlap or leave a hole.
        """
        boxes = self._boxes.get(name)
        if not boxes:
            raise CheckpointError(f"no data file holds {name}", where=self._where)
        parts = [box.file.read(box.key, Box.whole(box.shape)) for box in boxes]
        shape = _shape_of_whole(boxes)
        tensor = torch.empty(shape, dtype=parts[0].dtype)
        filled = torch.zeros(shape, dtype=torch.bool)
        for box, part in zip(boxes, parts, strict=True):
            region = Box(box.offsets, box.shape).within(Box.whole(shape))
            tensor[region] = part
            filled[region] = True
        stored = sum(part.numel() for part in parts)
        if stored != tensor.numel() or not bool(filled.all()):
            raise CheckpointError(
                f"the parts of {name} in the data files overlap or leave a hole",
                where=self._where,
            )
        return tensor


def _shape_of_whole(boxes: list[_StoredBox]) -> Coordinates:
    """Return how far the boxes of a tensor reach in each dim."""
    shape = []
    for dim in range(len(boxes[0].shape)):
        ends = [box.offsets[dim] + box.shape[dim] for box in boxes]
        shape.append(max(ends))
    return tuple(shape)
