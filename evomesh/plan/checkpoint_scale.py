"""Metadata of a checkpoint in a large world: the plans of a save and of a start from it, for all ranks.

The code of real saves and loads plans; only weights and the other processes are missing.
Ranks with the same position on the axes that shard a tensor hold the same boxes, so that
the lists of 16,384 ranks are few lists, many times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import (
    Box,
    Coordinates,
    LocalPart,
    local_box,
    split_box,
)
from evomesh.checkpoint.native.format import PieceRecord, TensorRecord
from evomesh.checkpoint.native.plan import (
    Assignment,
    LocalTensor,
    TensorBoxes,
    TensorType,
    assign,
    describe,
)
from evomesh.checkpoint.native.read import items_for
from evomesh.checkpoint.native.replicas import key_of_items
from evomesh.checkpoint.native.ring import Replicas, group_by_members
from evomesh.config.layout import run_sizes
from evomesh.config.schema import Config
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard, ShardSpec, spec_of
from evomesh.plan.trace import built_rank

# Overlaps of pieces with boxes that a prediction computes at most.
_MAX_OVERLAPS = 3_000_000
# As long as that of any piece.
_DIGEST = fmt.piece_hash(b"")


@dataclass(frozen=True)
class CheckpointScale:
    """Sizes of a checkpoint's plans; all sizes in bytes.

    Attributes:
        total: of all tensors.
        boxes_message: of the lists of boxes of all ranks, which rank 0 gets when it plans a save.
        plan_seconds: of a processor, in which this process planned the save, as rank 0 does.
        files: data files, one of each rank that writes.
        largest_file: what a rank writes at most.
        index: of the file that lists all pieces.
        wanted: pieces that a rank needs to start, at most; of some ranks where there are very many pieces.
        read: what a rank reads of them from the store, at most; None where only some ranks were looked at.
    """

    total: int
    boxes_message: int
    plan_seconds: float
    files: int
    largest_file: int
    pieces: int
    index: int
    wanted: int
    read: int | None


class StoredTensorKind(NamedTuple):
    """Type of a tensor in a checkpoint, and how it is distributed."""

    type: TensorType
    spec: ShardSpec


# By the position of a rank on the axes that shard a tensor.
RowsByPosition = dict[tuple[int, ...], list[TensorBoxes]]


class StageTensors:
    """Tensors of a checkpoint that the ranks of one pipeline stage hold, and the boxes of each rank."""

    def __init__(
        self,
        tensors: dict[str, StoredTensorKind],
    ) -> None:
        self._tensors = tensors
        axes: set[str] = set()
        for tensor in tensors.values():
            for shard in tensor.spec.shards:
                axis, _ = shard
                axes.add(axis)
        self._axes = sorted(axes)
        self._rows: RowsByPosition = {}

    @staticmethod
    def of(config: Config, world_size: int, rank: int) -> StageTensors:
        """Build model and optimizer of a rank, on the meta device, and take what a checkpoint has of them."""
        with built_rank(config, world_size, rank) as built:
            grid, stages, optimizer = built
            tensors: dict[str, Tensor | LocalShard] = {}
            tensors.update(stages.parameters())
            tensors.update(optimizer.state_shards())
            local = describe(tensors, grid)
        found = {}
        for name, tensor in tensors.items():
            described = local[name]
            tensor_type = TensorType(
                described.dtype,
                described.shape,
            )
            if isinstance(tensor, LocalShard):
                spec = tensor.spec
            else:
                spec = spec_of(tensor)
            kind = StoredTensorKind(tensor_type, spec)
            found[name] = kind
        return StageTensors(found)

    def rows(self, grid: Grid) -> list[TensorBoxes]:
        """Return what a rank of the stage tells rank 0 of its tensors; the same list for the same boxes."""
        axes = grid.axes
        position = tuple(axes[name].rank for name in self._axes)
        known = self._rows.get(position)
        if known is not None:
            return known
        rows = []
        for name, tensor in self._tensors.items():
            box = local_box(tensor.spec, grid)
            boxes: tuple[Box, ...] = ()
            if box.numel:
                boxes = (box,)
            row = TensorBoxes(name, tensor.type, boxes)
            rows.append(row)
        self._rows[position] = rows
        return rows


def checkpoint_scale(
    config: Config, world_size: int, grids: Sequence[Grid]
) -> CheckpointScale:
    """Plan a save and a start from it for all ranks of a world.

    Args:
        grids: of all ranks.

    Raises:
        UserError: the layout does not fit.
    """
    # 1. The boxes that each rank holds.
    held = held_boxes(config, world_size, grids)

    # 2. Rank 0 plans the save.
    begun = time.process_time()
    assignment = assign(held)
    plan_seconds = time.process_time() - begun

    # 3. What is written: data files and the index.
    records, file_sizes = _written(held, assignment)
    index = sum(len(record.to_line()) for record in records.values())
    pieces = sum(len(record.pieces) for record in records.values())

    # 4. What each rank reads at the next start.
    wanted, read = _reading(held, records, pieces)
    return CheckpointScale(
        total=sum(tensor.size for tensor in assignment.tensors.values()),
        boxes_message=_message_bytes(held),
        plan_seconds=plan_seconds,
        files=sum(1 for size in file_sizes if size),
        largest_file=max(file_sizes),
        pieces=pieces,
        index=index,
        wanted=wanted,
        read=read,
    )


# Of each rank; ranks with the same boxes share one list.
HeldLists = Sequence[list[TensorBoxes]]


def held_boxes(config: Config, world_size: int, grids: Sequence[Grid]) -> HeldLists:
    """Return the boxes that each rank holds."""
    sizes = run_sizes(config, world_size)
    distance = sizes.ranks_per_stage
    held = []
    for rank, grid in enumerate(grids):
        is_first = rank % distance == 0
        if is_first:
            stage = StageTensors.of(config, world_size, rank)
        rows = stage.rows(grid)
        held.append(rows)
    return held


def _distinct(held: HeldLists) -> dict[int, list[TensorBoxes]]:
    """Return the lists that differ, by their identity."""
    return {id(rows): rows for rows in held}


def _message_bytes(held: HeldLists) -> int:
    size_of = {}
    for key, rows in _distinct(held).items():
        message = [row.to_json() for row in rows]
        size_of[key] = len(json.dumps(message))
    return sum(size_of[id(rows)] for rows in held)


def _written(
    held: HeldLists, assignment: Assignment
) -> tuple[dict[str, TensorRecord], list[int]]:
    """Return the records of all tensors and the bytes that each rank writes."""
    boxes_in = {}
    for key, rows in _distinct(held).items():
        boxes_in[key] = {row.name: row.boxes for row in rows}
    pieces: dict[str, list[PieceRecord]] = {}
    sizes = []
    for rank, owned in enumerate(assignment.owned):
        boxes = boxes_in[id(held[rank])]
        position = 0
        for name, number in owned:
            item_size = assignment.tensors[name].item_size
            whole = boxes[name][number]
            of_tensor = pieces.setdefault(name, [])
            for box in split_box(whole, item_size, fmt.PIECE_BYTES):
                piece = PieceRecord(rank, box, position, _DIGEST)
                of_tensor.append(piece)
                position += box.numel * item_size
        sizes.append(position)

    records = {}
    for name, tensor in assignment.tensors.items():
        of_tensor = pieces[name]
        of_tensor.sort(key=_offsets)
        records[name] = TensorRecord(
            name,
            tensor.dtype,
            tensor.shape,
            tuple(of_tensor),
        )
    return records, sizes


def _offsets(piece: PieceRecord) -> Coordinates:
    return piece.box.offsets


def _reading(
    held: HeldLists, records: Mapping[str, TensorRecord], pieces: int
) -> tuple[int, int | None]:
    """Return the most bytes that a rank wants, and the most that it reads from the store."""
    looked_at, all_of_them = _some_of(held, pieces)
    wanted = 0
    keys: dict[int, list[str]] = {}
    sizes: dict[str, int] = {}
    for rows in looked_at:
        wanted_here = _wanted_pieces(rows, records)
        sizes.update(wanted_here)
        keys[id(rows)] = list(wanted_here)
        total = sum(wanted_here.values())
        wanted = max(wanted, total)
    if not all_of_them:
        return wanted, None
    keys_by_rank = []
    for rows in held:
        own_keys = keys[id(rows)]
        keys_by_rank.append(own_keys)
    groups = group_by_members(keys_by_rank)
    read = _most_read(held, groups, keys, sizes)
    return wanted, read


def _some_of(
    held: HeldLists,
    pieces: int,
) -> tuple[list[list[TensorBoxes]], bool]:
    """Return the lists that differ, evenly spaced ones where there are too many; and whether these are all."""
    distinct = list(_distinct(held).values())
    total = len(distinct)
    affordable = _MAX_OVERLAPS // pieces
    count = max(min(total, affordable), 1)
    chosen = []
    for index in range(count):
        position = index * total // count
        rows = distinct[position]
        chosen.append(rows)
    return chosen, count == total


def _wanted_pieces(
    rows: Sequence[TensorBoxes], records: Mapping[str, TensorRecord]
) -> dict[str, int]:
    """Return the bytes of the pieces of each tensor that a rank wants, by the key that ranks compare."""
    sizes = {}
    for row in rows:
        local = {row.name: _local(row)}
        items = items_for(records, local)
        if items:
            key = key_of_items(items)
            sizes[key] = sum(item.size for item in items)
    return sizes


def _most_read(
    held: HeldLists,
    groups: Sequence[Sequence[Replicas]],
    keys: Mapping[int, Sequence[str]],
    sizes: Mapping[str, int],
) -> int:
    """Return the most that a rank reads: its share of what it wants together with others."""
    most = 0.0
    for rows, own_groups in zip(held, groups, strict=True):
        own_keys = keys[id(rows)]
        read = 0.0
        for members, positions in own_groups:
            together = sum(sizes[own_keys[position]] for position in positions)
            read += together / len(members)
        most = max(most, read)
    return round(most)


def _local(row: TensorBoxes) -> LocalTensor:
    nothing = torch.empty(0)
    parts = [LocalPart(nothing, box) for box in row.boxes]
    return LocalTensor(row.name, row.type.dtype, row.type.shape, parts)
