"""Where a local tensor lies in the global one: axis-aligned boxes, their cuts and overlaps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import local_shard, spec_of

Coordinates = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a global tensor: ``offsets`` of its first element and its ``shape``. 0-d: both ()."""

    offsets: Coordinates
    shape: Coordinates

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """What both contain, None when that is nothing."""
        start = tuple(map(max, self.offsets, other.offsets))
        stop = map(min, _ends(self), _ends(other))
        shape = tuple(e - s for s, e in zip(start, stop, strict=True))
        return None if any(n <= 0 for n in shape) else Box(start, shape)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Slices that pick this box out of a tensor that holds ``outer``."""
        pairs = zip(self.offsets, self.shape, outer.offsets, strict=True)
        return tuple(slice(o - base, o - base + n) for o, n, base in pairs)


def _ends(box: Box) -> list[int]:
    return [o + n for o, n in zip(box.offsets, box.shape, strict=True)]


@dataclass(frozen=True)
class LocalPart:
    """A local view and the global box it holds."""

    tensor: Tensor
    box: Box


def split_box(box: Box, item_size: int, limit: int) -> Iterator[Box]:
    """Pieces of at most ``limit`` bytes in row-major order, each contiguous in the bytes of ``box``.

    The cut goes along the first dimension longer than 1, deeper where one row is larger than the limit.
    """
    if box.numel * item_size <= limit or box.numel <= 1:
        yield box
        return
    dim = next(d for d, n in enumerate(box.shape) if n > 1)
    row_bytes = math.prod(box.shape[dim + 1 :]) * item_size
    rows = max(1, limit // row_bytes)
    for first in range(0, box.shape[dim], rows):
        count = min(rows, box.shape[dim] - first)
        offsets = (*box.offsets[:dim], box.offsets[dim] + first, *box.offsets[dim + 1 :])
        yield from split_box(Box(offsets, (*box.shape[:dim], count, *box.shape[dim + 1 :])), item_size, limit)


def covers_once(shape: Coordinates, boxes: Sequence[Box]) -> bool:
    """Whether the boxes hold every element of a tensor of ``shape`` exactly once."""
    if sum(box.numel for box in boxes) != math.prod(shape):
        return False
    if any(
        o < 0 or o + n > size
        for box in boxes
        for o, n, size in zip(box.offsets, box.shape, shape, strict=True)
    ):
        return False
    if len(boxes) <= 1:
        return True
    # Coordinates are compressed to the box edges; then each cell of that small grid must be counted once.
    edges = [
        sorted({e for b in boxes for e in (b.offsets[d], b.offsets[d] + b.shape[d])})
        for d in range(len(shape))
    ]
    place = [{edge: i for i, edge in enumerate(along)} for along in edges]
    count = np.zeros([len(along) - 1 for along in edges], dtype=np.int32)
    for box in boxes:
        ends = _ends(box)
        count[tuple(slice(place[d][o], place[d][ends[d]]) for d, o in enumerate(box.offsets))] += 1
    return bool((count == 1).all())


def parts_of(tensor: Tensor, grid: Grid) -> tuple[Coordinates, list[LocalPart]]:
    """Global shape and the local parts of a tensor: usually one, none when this rank holds no element.

    A tensor says where it lies by its ``ShardSpec`` and the grid; one whose local elements form several boxes (a flat
    optimizer chunk, a fused weight) carries a tuple of ``Part`` as ``tensor.parts`` beside its spec.
    Rows that the spec calls padding are left out.
    """
    spec = spec_of(tensor)
    parts: Sequence[LocalPart] | None = getattr(tensor, "parts", None)
    tensor = local_shard(
        tensor.detach()
    )  # with weight sharding: its local storage, placed by the spec like any other
    if parts is not None:
        return spec.stored_shape, [part for part in parts if part.box.numel]
    if tensor.dim() != len(spec.shape):
        raise ValueError(f"a local tensor of shape {tuple(tensor.shape)} cannot be part of {spec.shape}")
    offsets, sizes = [], []
    for dim, length in enumerate(spec.shape):
        axes = [grid_axis(grid, name) for name, along in spec.shards if along == dim]
        start, size = chunk(length, axes)
        if size != tensor.shape[dim] and tensor.numel():
            raise ValueError(
                f"{tensor.shape[dim]} local rows in dim {dim}, but its share of {length} is {size}"
            )
        offsets.append(start)
        sizes.append(max(0, min(size, spec.stored_shape[dim] - start)))
    box = Box(tuple(offsets), tuple(sizes))
    if not box.numel:
        return spec.stored_shape, []
    for dim, size in enumerate(sizes):
        if size < tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, size)
    return spec.stored_shape, [LocalPart(tensor, box)]


def grid_axis(grid: Grid, name: str) -> Axis:
    axis: Axis = getattr(grid, name)
    return axis


def chunk(length: int, axes: Sequence[Axis]) -> tuple[int, int]:
    """Start and size of one rank's share by torch.chunk's rule: the rounded-up mean for all but the last."""
    start = 0
    for axis in axes:
        share = -(-length // axis.size)
        first = min(axis.rank * share, length)
        start, length = start + first, min(share, length - first)
    return start, length
