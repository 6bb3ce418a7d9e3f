"""Plan a save: every element of every tensor is written by exactly one rank.

The rank is chosen once per layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from evomesh.checkpoint.native.boxes import (
    Box,
    Coordinates,
    LocalPart,
    covers_once,
    local_part,
)
from evomesh.checkpoint.native.format import (
    DTYPE_NAMES,
    DTYPES,
    LAYOUT_AXES,
    CheckpointError,
    canonical,
    layout_record,
    sha256,
)
from evomesh.parallel.exchange import Exchange
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard, spec_of

SHOWN_BOXES = 8  # in an error message


def layout_of(grid: Grid, world: int) -> dict[str, int]:
    """Return the ``layout`` of a commit record for the axes of a grid."""
    sizes = {axis: getattr(grid, axis).size for axis in LAYOUT_AXES}
    return layout_record(world, **sizes)


class TensorType(NamedTuple):
    """Dtype name and global shape of a tensor."""

    dtype: str
    shape: Coordinates

    @property
    def item_size(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_size


class BoxHolder(NamedTuple):
    """A rank that holds a box, and which of the rank's parts of the tensor it is."""

    rank: int
    number: int


@dataclass(frozen=True)
class LocalTensor:
    """A named tensor of this rank: dtype name, global shape and the parts held here."""

    name: str
    dtype: str
    shape: Coordinates
    parts: list[LocalPart]


@dataclass(frozen=True)
class TensorBoxes:
    """The boxes of a tensor that a rank holds: a message to rank 0, which plans the save."""

    name: str
    type: TensorType
    boxes: tuple[Box, ...]

    @staticmethod
    def of(tensor: LocalTensor) -> TensorBoxes:
        boxes = tuple(part.box for part in tensor.parts)
        return TensorBoxes(tensor.name, TensorType(tensor.dtype, tensor.shape), boxes)

    def to_json(self) -> list[Any]:
        boxes = [[list(box.offsets), list(box.shape)] for box in self.boxes]
        return [self.name, self.type.dtype, list(self.type.shape), boxes]

    @staticmethod
    def from_json(value: list[Any]) -> TensorBoxes:
        name, dtype, shape, boxes = value
        return TensorBoxes(
            name,
            TensorType(dtype, tuple(shape)),
            tuple(Box(tuple(offsets), tuple(lengths)) for offsets, lengths in boxes),
        )


@dataclass(frozen=True)
class WriteItem:
    """One box of a tensor that this rank writes."""

    name: str
    dtype: str
    shape: Coordinates
    part: LocalPart

    @property
    def size(self) -> int:
        """Bytes of the box."""
        return self.part.box.numel * DTYPES[self.dtype].itemsize


class OwnedPart(NamedTuple):
    """A part that a rank writes: tensor, and which of the rank's parts of it."""

    name: str
    number: int


@dataclass(frozen=True)
class SavePlan:
    """The parts that this rank writes, and the types of all tensors (rank 0 only)."""

    owned: list[OwnedPart]
    tensors: dict[str, TensorType]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors; on rank 0 only."""
        return sum(tensor.size for tensor in self.tensors.values())

    def items(self, local: Mapping[str, LocalTensor]) -> list[WriteItem]:
        """Return what this rank writes, in the order of the data file."""
        items = []
        for name, number in self.owned:
            tensor = local[name]
            items.append(
                WriteItem(name, tensor.dtype, tensor.shape, tensor.parts[number])
            )
        return in_file_order(items)


def in_file_order(items: Iterable[WriteItem]) -> list[WriteItem]:
    """Sort items by element size, largest first.

    Every offset in the file is then a multiple of its item size.
    """
    # [3] float32 after [3] bfloat16 would begin at byte 6. The other way around it is
    # bytes 0 and 12, and a reader that maps the file can view both in place.
    return sorted(
        items,
        key=lambda item: (
            -DTYPES[item.dtype].itemsize,
            item.name,
            item.part.box.offsets,
        ),
    )


def describe(
    tensors: Mapping[str, Tensor | LocalShard], grid: Grid
) -> dict[str, LocalTensor]:
    """Find which part of its global tensor each tensor of this rank holds.

    Args:
        tensors: parameters, whose spec is their attribute, and other tensors with theirs; a plain tensor is whole.

    Raises:
        ValueError: a tensor that does not fit its spec, or of a dtype that the format does not have.
    """
    local = {}
    for name, tensor in tensors.items():
        shard = tensor
        if not isinstance(shard, LocalShard):
            shard = LocalShard(shard, spec_of(shard))
        dtype = shard.tensor.dtype
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: a checkpoint cannot hold {dtype}")
        try:
            part = local_part(shard, grid)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        local[name] = LocalTensor(
            name, DTYPE_NAMES[dtype], shard.spec.stored_shape, [part] if part else []
        )
    return local


def signature(local: Mapping[str, LocalTensor]) -> str:
    """Return a hash that changes when the layout of this rank's tensors does."""
    return sha256(canonical(_boxes_to_json(local)))


def make_plan(local: Mapping[str, LocalTensor], exchange: Exchange) -> SavePlan:
    """Assign each distinct box to the least loaded rank that holds it.

    Raises:
        CheckpointError: on every rank, if ranks disagree about a tensor or their boxes
            do not cover it exactly once.
    """
    # 1. Rank 0 learns the boxes of all ranks.
    message = _boxes_to_json(local)
    gathered = exchange.gather(message)

    # 2. It decides for all; an error is its answer too, so that no rank waits for one
    #    that has raised.
    answers: list[dict[str, Any]] | None = None
    tensors: dict[str, TensorType] = {}
    if gathered is not None:
        held = list(map(_boxes_from_json, gathered))
        try:
            owned_by_rank, tensors = assign(held)
            answers = [{"owned": owned} for owned in owned_by_rank]
        except CheckpointError as error:
            answers = [{"error": error.found}] * exchange.size

    # 3. Every rank gets its share of the answer, and no other's: of a thousand ranks, all
    #    lists together are 16 MB.
    answer = exchange.scatter(answers)
    if "error" in answer:
        raise CheckpointError(answer["error"], code="EVO-PARALLEL-011")
    own_parts = []
    for fields in answer["owned"]:
        part = OwnedPart(*fields)
        own_parts.append(part)
    return SavePlan(own_parts, tensors)


def _boxes_to_json(local: Mapping[str, LocalTensor]) -> list[Any]:
    """Return what a rank holds of each tensor, as a message."""
    return [TensorBoxes.of(tensor).to_json() for tensor in local.values()]


def _boxes_from_json(rows: Iterable[Any]) -> list[TensorBoxes]:
    return [TensorBoxes.from_json(row) for row in rows]


# For each rank, the boxes of the tensors that it holds.
HeldBoxes = Sequence[Sequence[TensorBoxes]]
# Of one tensor: a rank for each replica of a box.
HoldersOfBoxes = dict[Box, list[BoxHolder]]
# The same for each tensor by name.
Holders = dict[str, HoldersOfBoxes]
OwnedParts = list[OwnedPart]


class Assignment(NamedTuple):
    """The parts that each rank writes, and the types of all tensors."""

    owned: list[OwnedParts]
    tensors: dict[str, TensorType]


def assign(held: HeldBoxes) -> Assignment:
    """Choose a rank for each distinct box.

    Raises:
        CheckpointError: ranks disagree about a tensor, or the boxes do not cover it
            exactly once.
    """
    tensors = _agreed_types(held)
    holders = _find_holders(held)
    owned: list[OwnedParts] = []
    load = []  # bytes that each rank writes so far
    for _ in held:
        owned.append([])
        load.append(0)

    def load_of(holder: BoxHolder) -> int:
        return load[holder.rank]

    for name, tensor in tensors.items():
        boxes = holders[name]
        # Equal boxes are replicas, of which one is written. Boxes that overlap without
        # being equal are a mistake in a spec, and it is found here, before any file.
        check_cover(name, tensor.shape, list(boxes))
        for box, candidates in boxes.items():
            # Each box goes to the holder with the fewest bytes so far, so that all ranks
            # write about the same; the first of equals, so that a plan can be repeated.
            rank, number = min(candidates, key=load_of)
            size = box.numel * tensor.item_size
            load[rank] += size
            part = OwnedPart(name, number)
            owned[rank].append(part)
    return Assignment(owned, tensors)


def _find_holders(held: HeldBoxes) -> Holders:
    """Return the holders of each distinct box of each tensor.

    A replicated box has several: of a weight on two data-parallel ranks, (0, 0) and (1,
    0).
    """
    holders: Holders = {}
    for rank, rows in enumerate(held):
        for row in rows:
            holders_of_boxes = holders.setdefault(row.name, {})
            for number, box in enumerate(row.boxes):
                holders_of_box = holders_of_boxes.setdefault(box, [])
                holder = BoxHolder(rank, number)
                holders_of_box.append(holder)
    return holders


def _agreed_types(held: HeldBoxes) -> dict[str, TensorType]:
    """Collect the types of all tensors; every rank must name the same one."""
    types: dict[str, TensorType] = {}
    first_rank: dict[str, int] = {}
    for rank, rows in enumerate(held):
        for row in rows:
            known = types.setdefault(row.name, row.type)
            first = first_rank.setdefault(row.name, rank)
            if known != row.type:
                raise CheckpointError(
                    f"{row.name}: rank {rank} has {row.type.dtype}{list(row.type.shape)}, "
                    f"rank {first} has {known.dtype}{list(known.shape)}",
                    code="EVO-PARALLEL-011",
                )
    return types


def check_cover(name: str, shape: Coordinates, boxes: Sequence[Box]) -> None:
    """Refuse boxes that do not cover a tensor exactly once.

    Raises:
        CheckpointError: naming the tensor and its boxes.
    """
    if not covers_once(shape, boxes):
        shown = ", ".join(
            f"{list(box.offsets)}+{list(box.shape)}" for box in boxes[:SHOWN_BOXES]
        )
        raise CheckpointError(
            f"{name}{list(shape)}: local boxes overlap or leave a hole: {shown}",
            code="EVO-PARALLEL-011",
        )
