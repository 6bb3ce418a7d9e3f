"""Rewrite a checkpoint for another layout, without ranks and in bounded memory.

Loading never needs this: any layout reads any checkpoint. It lets each rank of the new
layout read one file only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import Box, LocalPart, local_box, split_box
from evomesh.checkpoint.native.commit import commit, new_attempt, refuse_committed
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import (
    ParentRecord,
    PieceRecord,
    TensorRecord,
    layout_record,
)
from evomesh.checkpoint.native.plan import (
    TensorBoxes,
    TensorType,
    WriteItem,
    assign,
    in_file_order,
)
from evomesh.checkpoint.native.read import read_tensor
from evomesh.checkpoint.native.write import Pieces, as_bytes
from evomesh.config.layout import AxisSizes, axis_sizes
from evomesh.config.schema import ModelConfig, ParallelConfig
from evomesh.models.registry import build_model
from evomesh.optim.slot import make_slot
from evomesh.parallel.build import axis_members
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.spec import ShardSpec, spec_of
from evomesh.pipeline.stages import layer_ranges
from evomesh.storage.urls import open_storage

# What update rules, and the average of the weights, store as optim.KIND.NAME.
STATE_KINDS = ("exp_avg", "exp_avg_sq", "momentum", "z", "ema", "master")
CACHED_PIECES = 16  # pieces of the old checkpoint in memory: 64 MiB at most
RankBoxes = dict[str, Box]  # of one rank: tensor -> the box of it that the rank holds


def reshard(
    source: Checkpoint,
    target: str,
    model: ModelConfig,
    parallel: ParallelConfig,
    world: int,
) -> str:
    """Write ``source`` as ``world`` ranks of ``parallel`` would, and return the folder.

    Args:
        target: save folder to write into.

    Raises:
        CheckpointError: damaged source, or the step is already committed in the target.
        UserError: sizes that do not divide.
    """
    storage, root = open_storage(target)
    folder = refuse_committed(storage, root, source.step)
    records = source.records()
    sizes = axis_sizes(parallel, world)

    # 1. Which box of every tensor each rank of the new layout holds. A tensor that the
    #    model does not have (of another program, say) goes to rank 0 as a whole.
    boxes = [
        _boxes_of_rank(records, model, parallel, sizes, rank) for rank in range(world)
    ]
    for name in set(records).difference(*boxes):
        boxes[0][name] = Box.whole(records[name].shape)

    # 2. Which rank writes which box.
    held = []
    for of_rank in boxes:
        held.append([_held(records[name], box) for name, box in of_rank.items()])
    owned, tensors = assign(held)
    files = []
    for of_rank, parts in zip(boxes, owned, strict=True):
        items = []
        for part in parts:
            box = of_rank[part.name]
            items.append(_item(records[part.name], box))
        files.append(in_file_order(items))

    # 3. The record is that of the source, but for the attempt and the layout.
    axes = {axis: getattr(sizes, axis) for axis in fmt.LAYOUT_AXES}
    record = replace(
        source.record,
        attempt=new_attempt(),
        parent=ParentRecord(source.step, source.attempt),
        layout=layout_record(world, **axes),
    )
    contents = BoxReader(source, records)
    commit(storage, folder, files, tensors, record, contents.pieces)
    return folder


def _held(record: TensorRecord, box: Box) -> TensorBoxes:
    boxes = (box,) if box.numel else ()
    return TensorBoxes(record.name, TensorType(record.dtype, record.shape), boxes)


def _item(record: TensorRecord, box: Box) -> WriteItem:
    # No tensor exists for it: ``BoxReader`` yields its bytes piece by piece.
    part = LocalPart(torch.empty(0), box)
    return WriteItem(record.name, record.dtype, record.shape, part)


def _boxes_of_rank(
    records: Mapping[str, TensorRecord],
    model: ModelConfig,
    parallel: ParallelConfig,
    sizes: AxisSizes,
    rank: int,
) -> RankBoxes:
    """Return the boxes of the model and its optimizer state that a rank will hold.

    ``rank`` is one of the new layout.
    """
    members = axis_members(sizes, rank)
    axes = {}
    for name, ranks in members.items():
        axes[name] = Axis(name, len(ranks), ranks.index(rank))
    grid = Grid(**axes)
    # The model of that rank is built without memory, for its specs alone: the same code
    # that shards a model in training decides here, and no rule exists twice.
    stages = layer_ranges(model.num_layers, sizes.pp)
    built = build_model(
        model,
        grid=grid,
        mode=MODES[parallel.tensor.mode],
        device="meta",
        layer_range=stages[grid.pp.rank],
    )
    specs: dict[str, ShardSpec] = {}
    for name, parameter in built.named_parameters():
        specs[name] = spec_of(parameter)
        state = make_slot(name, parameter, grid).spec
        for kind in STATE_KINDS:
            specs[f"optim.{kind}.{name}"] = state
    boxes = {}
    for name, spec in specs.items():
        record = records.get(name)
        if record is not None and spec.stored_shape == record.shape:
            boxes[name] = local_box(spec, grid)
    return boxes


class BoxReader:
    """The bytes of new boxes, assembled from the pieces of the old checkpoint.

    Each piece is verified when it is read.
    """

    def __init__(
        self, checkpoint: Checkpoint, records: Mapping[str, TensorRecord]
    ) -> None:
        self._checkpoint = checkpoint
        self._records = records
        self._cache: OrderedDict[PieceRecord, Tensor] = OrderedDict()

    def pieces(self, item: WriteItem) -> Pieces:
        """Yield the pieces of an item of the new checkpoint with their bytes."""
        record = self._records[item.name]
        for box in split_box(item.part.box, record.item_size, fmt.PIECE_BYTES):
            yield box, as_bytes(self.assemble(record, box))

    def assemble(self, record: TensorRecord, box: Box) -> Tensor:
        """Take what a new piece needs from every old piece that it overlaps.

        Rows 4 to 8 need rows 4 and 5 of the old piece 0 to 6, and rows 6 and 7 of the
        old piece 6 to 12.
        """
        target = torch.empty(box.shape, dtype=fmt.DTYPES[record.dtype])
        for piece in record.pieces:
            both = piece.box.overlap(box)
            if both is None:
                continue
            source = self._read(record, piece)
            in_source = both.within(piece.box)
            in_target = both.within(box)
            target[in_target] = source[in_source]
        return target

    def _read(self, record: TensorRecord, piece: PieceRecord) -> Tensor:
        """Read a piece of the old checkpoint, or take it from the cache."""
        # Neighboring new pieces need the same old one: where columns become rows, all of
        # them do. Without the cache each would read and hash it again.
        if piece not in self._cache:
            self._cache[piece] = read_tensor(self._checkpoint, record, piece.box)
            while len(self._cache) > CACHED_PIECES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(piece)
        return self._cache[piece]
