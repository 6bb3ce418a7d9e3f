"""Axis-aligned boxes of global tensors.

Overlaps, pieces, and whether boxes cover a tensor exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard, ShardSpec, local_shard

Coordinates = tuple[int, ...]
MAX_CELLS = 1 << 24  # 64 MiB of counters


@dataclass(frozen=True)
class Box:
    """An axis-aligned region of a global tensor.

    Attributes:
        offsets: index of its first element in every dim; () for a 0-d tensor.
        shape: its length in every dim.
    """

    offsets: Coordinates
    shape: Coordinates

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """Return the box that holds all of a tensor of ``shape``."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def ends(self) -> Coordinates:
        """Index after the last element in every dim."""
        return tuple(
            offset + length
            for offset, length in zip(self.offsets, self.shape, strict=True)
        )

    def overlap(self, other: Box) -> Box | None:
        """Return the region that both boxes contain, None if it is empty."""
        start = tuple(map(max, self.offsets, other.offsets))
        stop = map(min, self.ends, other.ends)
        shape = tuple(last - first for first, last in zip(start, stop, strict=True))
        if any(length <= 0 for length in shape):
            return None
        return Box(start, shape)

    def narrow(self, dim: int, part: range) -> Box:
        """Return the box that holds only ``part`` of the indices of ``dim``.

        Indices count from the box's first.
        """
        offsets = list(self.offsets)
        offsets[dim] += part.start
        shape = list(self.shape)
        shape[dim] = len(part)
        return Box(tuple(offsets), tuple(shape))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return the slices that select this box from a tensor that holds ``outer``."""
        dims = zip(self.offsets, self.shape, outer.offsets, strict=True)
        return tuple(
            slice(offset - base, offset - base + length)
            for offset, length, base in dims
        )


@dataclass(frozen=True)
class LocalPart:
    """A view of local memory and the box of the global tensor that it holds."""

    tensor: Tensor
    box: Box


def split_box(box: Box, item_size: int, limit: int) -> Iterator[Box]:
    """Yield sub-boxes of at most ``limit`` bytes, in row-major order.

    Each is contiguous in the bytes of ``box``. The box is split along its first dim
    longer than 1; where one row of it is larger than the limit, the row is split along
    the next dim. A float32 box [6, 100] with a limit of 1000 bytes becomes 3 boxes of 2
    rows.
    """
    size = box.numel * item_size
    if size <= limit or box.numel <= 1:
        yield box
        return
    # Dims of length 1 before this one do not part the memory, so whole rows of it are
    # contiguous. Rows of a later dim would be strewn over the box.
    dim = 0
    while box.shape[dim] == 1:
        dim += 1
    length = box.shape[dim]
    row_bytes = size // length
    rows = max(1, limit // row_bytes)
    for first in range(0, length, rows):
        after_last = min(first + rows, length)
        narrowed = box.narrow(dim, range(first, after_last))
        yield from split_box(narrowed, item_size, limit)


def covers_once(shape: Coordinates, boxes: Sequence[Box]) -> bool:
    """Return whether the boxes hold every element of ``shape`` exactly once."""
    # Boxes inside the tensor, with as many elements as it has: a hole then means that
    # two of them overlap, so it is enough to prove them disjoint.
    if sum(box.numel for box in boxes) != math.prod(shape):
        return False
    if not all(_is_inside(box, shape) for box in boxes):
        return False
    return len(boxes) <= 1 or _all_disjoint(boxes)


def _is_inside(box: Box, shape: Coordinates) -> bool:
    positive = all(offset >= 0 for offset in box.offsets)
    return positive and all(
        end <= length for end, length in zip(box.ends, shape, strict=True)
    )


def _all_disjoint(boxes: Sequence[Box]) -> bool:
    """Return whether no element is in two boxes.

    Together they must be as large as their tensor.
    """
    # The edges of all boxes divide the tensor into a small grid of cells, each of which
    # is inside a box or outside it. A cell that is not counted exactly once is a hole
    # or an overlap. Rows 0 to 4 and 4 to 6 have the edges 0, 4 and 6: two cells,
    # however large the tensor is.
    num_dims = len(boxes[0].shape)
    cell_of = []
    num_cells = []
    num_edges = 1
    for dim in range(num_dims):
        cells = _cells(boxes, dim)
        cell_of.append(cells)
        num_cells.append(len(cells) - 1)
        num_edges *= len(cells)
    if num_edges > MAX_CELLS:
        # The boxes of a save are aligned to one another: so many edges were made up.
        return False
    count = np.zeros(num_cells, dtype=np.int32)
    for box in boxes:
        covered = _cells_of(box, cell_of)
        count[covered] += 1
    is_once = count == 1
    return bool(is_once.all())


def _cells_of(box: Box, cell_of: Sequence[dict[int, int]]) -> tuple[slice, ...]:
    """Return the slices of the cells that a box covers."""
    covered = []
    for cells, start, end in zip(cell_of, box.offsets, box.ends, strict=True):
        first = cells[start]
        after_last = cells[end]
        covered.append(slice(first, after_last))
    return tuple(covered)


def _cells(boxes: Sequence[Box], dim: int) -> dict[int, int]:
    """Map the edges of all boxes along ``dim`` to ascending numbers.

    Cell n is between edges n and n + 1.
    """
    edges = {box.offsets[dim] for box in boxes}
    edges |= {box.ends[dim] for box in boxes}
    return {edge: number for number, edge in enumerate(sorted(edges))}


def local_box(spec: ShardSpec, grid: Grid) -> Box:
    """Return the box of the stored tensor that this rank holds; it may be empty."""
    ranges = spec.stored_ranges(grid)
    return Box(
        tuple(held.start for held in ranges), tuple(len(held) for held in ranges)
    )


def local_part(shard: LocalShard, grid: Grid) -> LocalPart | None:
    """Return what a checkpoint stores of a tensor of this rank.

    It is a view without padding rows, and its box; None if this rank holds no element.

    Raises:
        ValueError: the tensor does not have the shape that follows from its spec.
    """
    spec = shard.spec
    # With weight sharding this is the local storage; the spec describes it like any
    # other.
    tensor = local_shard(shard.tensor.detach())
    if tensor.dim() != len(spec.shape):
        raise ValueError(
            f"a local tensor of shape {tuple(tensor.shape)} cannot be part of {spec.shape}"
        )
    for dim, held in enumerate(spec.local_ranges(grid.axes)):
        if len(held) != tensor.shape[dim] and tensor.numel():
            raise ValueError(
                f"{tensor.shape[dim]} local rows in dim {dim}, but its share of {spec.shape[dim]} is {len(held)}"
            )
    # A vocabulary of 32,001 rows on 2 ranks: each has 16,001 local rows, of which the
    # last one of rank 1 is padding. Its box ends before it: padding belongs to a layout,
    # and a checkpoint to none.
    box = local_box(spec, grid)
    if not box.numel:
        return None
    for dim, length in enumerate(box.shape):
        tensor = tensor.narrow(dim, 0, length)
    return LocalPart(tensor, box)
