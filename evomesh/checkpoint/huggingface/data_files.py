"""Read the tensors of a checkpoint by the headers of its data files, without the index.

A start or an export reads by ``index.jsonl``. What it read is compared with this: the
same bytes, found by the names and shapes that the safetensors files give themselves. A
mistake in the index, or in its reader, is then a difference and no common error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

    def read(self) -> Tensor:
        """Read the part."""
        with _reading():
            return self.file.read(self.key, Box.whole(self.shape))


class DataFiles:
    """All tensors in the data files of a checkpoint.

    Args:
        averages: prefix of the tensors that stand for the weights, where there are any.
    """

    def __init__(self, found: Checkpoint, averages: str = "") -> None:
        self._where = found.folder
        self._averages = averages
        self._boxes: dict[str, list[_StoredBox]] = {}
        for file in _data_files(found):
            self._add(file)

    def _add(self, file: SafetensorsFile) -> None:
        """Add the boxes of one data file."""
        for key, shape in file.shapes.items():
            # A part of a tensor has the key NAME@first,element: "w2@0,22".
            name, _, first = key.partition("@")
            offsets = _offsets(first, len(shape))
            box = _StoredBox(offsets, shape, file, key)
            of_tensor = self._boxes.setdefault(name, [])
            of_tensor.append(box)

    def read(self, name: str) -> Tensor:
        """Read a whole tensor.

        Raises:
            CheckpointError: no file holds it, or its parts overlap or leave a hole.
        """
        boxes = self._boxes.get(self._averages + name) or self._boxes.get(name)
        if not boxes:
            raise CheckpointError(
                f"no data file holds {name}", where=self._where, code="EVO-CKPT-002"
            )
        parts = [box.read() for box in boxes]
        shape = _shape_of_whole(boxes)
        whole = Box.whole(shape)
        tensor = torch.empty(shape, dtype=parts[0].dtype)
        filled = torch.zeros(shape, dtype=torch.bool)
        num_stored = 0
        for box, part in zip(boxes, parts, strict=True):
            region = Box(box.offsets, box.shape).within(whole)
            tensor[region] = part
            filled[region] = True
            num_stored += part.numel()
        # All filled, by as many elements as there are: none was filled twice.
        is_exact = num_stored == tensor.numel()
        if not is_exact or not bool(filled.all()):
            raise CheckpointError(
                f"the parts of {name} in the data files overlap or leave a hole",
                where=self._where,
                code="EVO-CKPT-002",
            )
        return tensor


def _data_files(found: Checkpoint) -> Iterator[SafetensorsFile]:
    """Open the data files of a checkpoint."""
    for record in found.files:
        path = join(found.folder, record.name)
        with _reading():
            file = SafetensorsFile(found.storage, path)
        yield file


@contextmanager
def _reading() -> Iterator[None]:
    """Name the damage of a data file as one of its checkpoint: it is not a model folder.

    Raises:
        CheckpointError: with the command that shows what else is damaged.
    """
    try:
        yield
    except CheckpointError as error:
        folder, _, _ = error.where.rpartition("/")
        raise CheckpointError(
            f"the data file is damaged: {error.found}",
            where=error.where,
            expected="the bytes that the run saved",
            fix=f"take another step, or copy this one again; evomesh ckpt verify {folder} names all that is damaged",
            code="EVO-CKPT-003",
        ) from None


def _offsets(first_element: str, num_dims: int) -> Coordinates:
    """Return the offsets in a key, zeros for a whole tensor."""
    if not first_element:
        return (0,) * num_dims
    numbers = first_element.split(",")
    return tuple(map(int, numbers))


def _shape_of_whole(boxes: list[_StoredBox]) -> Coordinates:
    """Return how far the boxes of a tensor reach in each dim."""
    shape = []
    for dim in range(len(boxes[0].shape)):
        ends = [box.offsets[dim] + box.shape[dim] for box in boxes]
        shape.append(max(ends))
    return tuple(shape)
