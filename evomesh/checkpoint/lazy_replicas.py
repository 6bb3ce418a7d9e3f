"""Read tensors of foreign folders that several ranks want once, and pass them around among them.

A thousand ranks of pure data parallelism that start from one Hugging Face folder want
all of it. Each reads its share of the boxes, converts them to the dtype of the model, and
they travel around a ring (``native/ring.py``). What ranks hold different parts of, each
reads for itself: only its own rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from evomesh.checkpoint.native.boxes import Box, Coordinates, LocalPart, split_box
from evomesh.checkpoint.native.plan import LocalTensor
from evomesh.checkpoint.native.read import refuse_not_finite
from evomesh.checkpoint.native.ring import (
    ReplicaRing,
    find_members,
    key_of,
    split_into_chunks,
)
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange

# Larger than a piece of a native checkpoint: each box is a separate request to a store.
CHUNK_BYTES = 32 * 2**20


class LazyTensor(Protocol):
    """A tensor that is still on disk.

    One that has an attribute ``reads_boxes`` that is true reads no more of a file than
    the box that it is asked for; replicas share its reads.
    """

    @property
    def shape(self) -> Coordinates: ...

    def read(self, box: Box | None = None) -> Tensor:
        """Return the tensor, or a box of it."""
        ...


@dataclass(frozen=True)
class LazyRead:
    """A tensor that this rank wants, still to be read."""

    wanted: LocalTensor
    tensor: LazyTensor

    @property
    def is_by_box(self) -> bool:
        """Return whether reading it box by box costs nothing."""
        return bool(getattr(self.tensor, "reads_boxes", False))

    @property
    def key(self) -> str:
        """Return what is equal on ranks that want the same."""
        boxes = [[part.box.offsets, part.box.shape] for part in self.wanted.parts]
        return key_of([self.wanted.name, self.wanted.dtype, boxes])

    def boxes(self) -> list[BoxRead]:
        """Return the parts in boxes of at most ``CHUNK_BYTES``."""
        boxes = []
        for part in self.wanted.parts:
            item_size = part.tensor.element_size()
            for box in split_box(part.box, item_size, CHUNK_BYTES):
                boxes.append(BoxRead(self, part, box))
        return boxes


@dataclass(frozen=True)
class BoxRead:
    """A box of a part that this rank holds; it travels in the dtype of the model."""

    of: LazyRead
    part: LocalPart
    box: Box

    @property
    def size(self) -> int:
        """Bytes of the box."""
        return self.box.numel * self.part.tensor.element_size()


class BoxSource:
    """Boxes of the tensors of a folder.

    Args:
        where: the folder, for errors.
    """

    def __init__(self, where: str) -> None:
        self._where = where

    def read(self, item: BoxRead, data: Tensor) -> None:
        values = item.of.tensor.read(item.box)
        converted = _values_of(item, data)
        converted.copy_(values)
        name = item.of.wanted.name
        refuse_not_finite(name, values, converted, self._where)

    def copy(self, item: BoxRead, data: Tensor) -> None:
        with torch.no_grad():
            target = item.part.tensor[item.box.within(item.part.box)]
            target.copy_(_values_of(item, data))


def _values_of(item: BoxRead, data: Tensor) -> Tensor:
    return data.view(item.part.tensor.dtype).view(item.box.shape)


def read_alone(read: LazyRead, where: str) -> None:
    """Read this rank's parts of a tensor, and check that they are finite."""
    for part in read.wanted.parts:
        copy_checked(read.wanted.name, part, read.tensor.read(part.box), where)


def copy_checked(name: str, part: LocalPart, values: Tensor, where: str) -> None:
    """Copy values into a part, cast to its dtype.

    Raises:
        CheckpointError: they are not finite there.
    """
    with torch.no_grad():
        part.tensor.copy_(values)
    refuse_not_finite(name, values, part.tensor, where)


def read_together(reads: Sequence[LazyRead], where: str, exchange: Exchange) -> None:
    """Read the tensors that each rank wants; what several want in whole, once.

    All ranks call it.

    Raises:
        UserError: that of the first tensor that this rank could not read; it has passed on
            everything that others need to get to the end, and reads nothing more.
    """
    by_box: list[LazyRead] = []
    alone: list[LazyRead] = []
    for read in reads:
        kind = by_box if read.is_by_box else alone
        kind.append(read)
    keys = [read.key for read in by_box]
    error: UserError | None = None
    for members, positions in find_members(keys, exchange):
        in_group = [by_box[position] for position in positions]
        if len(members) == 1:
            alone += in_group
        else:
            ring = _ring(members, in_group, exchange, error)
            error = ring.run(BoxSource(where))
    if error is not None:
        raise error
    for read in alone:
        read_alone(read, where)


def _ring(
    members: Sequence[int],
    reads: Sequence[LazyRead],
    exchange: Exchange,
    error: UserError | None,
) -> ReplicaRing[BoxRead]:
    """Return the ring of ranks that all want these tensors."""
    boxes: list[BoxRead] = []
    for read in reads:
        boxes += read.boxes()
    chunks = split_into_chunks(boxes, CHUNK_BYTES)
    return ReplicaRing(members, chunks, exchange, error)
