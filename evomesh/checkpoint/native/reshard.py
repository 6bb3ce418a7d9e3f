"""Rewrites a checkpoint in the cut of another layout, without ranks and in bounded memory.

Loading never needs this: any layout reads any checkpoint. It makes each rank of the new layout read one file only.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native import read, write
from evomesh.checkpoint.native.boxes import Box, LocalPart, chunk, grid_axis, split_box
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError, PieceRecord, TensorRecord
from evomesh.checkpoint.native.plan import WriteItem, assign, in_file_order
from evomesh.config.layout import AxisSizes, axis_sizes
from evomesh.config.schema import ModelConfig, ParallelConfig
from evomesh.models.registry import build_model
from evomesh.optim.slot import make_slot
from evomesh.parallel.build import axis_members
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.spec import ShardSpec, spec_of
from evomesh.pipeline.stages import layer_ranges
from evomesh.storage.base import join
from evomesh.storage.urls import open_storage

KEPT_PIECES = 16  # read pieces kept for the next boxes: 64 MiB at most
Boxes = dict[str, Box]  # of one rank: tensor -> where it lies


def reshard(found: Checkpoint, target: str, model: ModelConfig, parallel: ParallelConfig, world: int) -> str:
    """Writes ``found`` into the save folder ``target`` as ``world`` ranks of ``parallel`` would; returns the folder.

    Raises:
        CheckpointError: damaged source, or the step is already committed in the target.
        UserError: sizes that do not divide.
    """
    storage, root = open_storage(target)
    folder = join(root, fmt.folder_name(found.step))
    if storage.exists(join(folder, fmt.COMMIT)):
        raise CheckpointError(
            f"step {found.step} is already committed there", where=folder, fix="give another folder"
        )
    records, sizes = found.records(), axis_sizes(parallel, world)
    layouts = [_layout(records, model, parallel, sizes, rank) for rank in range(world)]
    homeless = set(records).difference(*layouts)  # tensors of no model we know: whole, on rank 0
    layouts[0] |= {name: Box((0,) * len(records[name].shape), records[name].shape) for name in homeless}
    owned, tensors = assign(
        [[_row(records[name], box) for name, box in layout.items()] for layout in layouts]
    )
    attempt = secrets.token_hex(4)
    storage.make_folder(folder)
    source = _ReshardSource(found, records)
    messages = []
    for rank, mine in enumerate(owned):
        places = [(records[name], layouts[rank][name]) for name, _ in mine]
        entries = [WriteItem(r.name, r.dtype, r.shape, LocalPart(torch.empty(0), box)) for r, box in places]
        messages.append(
            write.write_data(storage, folder, attempt, rank, in_file_order(entries), source.pieces)
        )
    storage.sync(root)
    body = found.body | {"attempt": attempt, "parent": {"step": found.step, "attempt": found.attempt}}
    names = ("tp", "wp", "pp", "dp", "zero")
    body |= {"layout": {"world": world, **{name: getattr(sizes, name) for name in names}}}
    body |= write.write_index(storage, folder, attempt, tensors, messages)
    write.publish(storage, folder, body)
    return folder


def _row(record: TensorRecord, box: Box) -> list[object]:
    boxes = [[list(box.offsets), list(box.shape)]] if box.numel else []
    return [record.name, record.dtype, list(record.shape), boxes]


def _layout(
    records: dict[str, TensorRecord],
    model: ModelConfig,
    parallel: ParallelConfig,
    sizes: AxisSizes,
    rank: int,
) -> Boxes:
    """Where the tensors of the model and its optimizer lie on one rank of the new layout."""
    members = axis_members(sizes, rank)
    grid = Grid(**{name: Axis(name, len(ranks), ranks.index(rank)) for name, ranks in members.items()})
    stage = layer_ranges(model.num_layers, sizes.pp)[grid.pp.rank]
    mode = MODES[parallel.tensor.mode]
    built = build_model(model, grid=grid, mode=mode, device="meta", layer_range=stage)
    boxes: Boxes = {}
    for name, parameter in built.named_parameters():
        state = make_slot(name, parameter, grid).spec
        specs = {name: spec_of(parameter)}
        specs |= {f"optim.{kind}.{name}": state for kind in ("exp_avg", "exp_avg_sq", "master")}
        boxes |= {
            n: _box(s, grid) for n, s in specs.items() if n in records and s.stored_shape == records[n].shape
        }
    return boxes


def _box(spec: ShardSpec, grid: Grid) -> Box:
    offsets, sizes = [], []
    for dim, length in enumerate(spec.shape):
        start, size = chunk(length, [grid_axis(grid, name) for name, along in spec.shards if along == dim])
        offsets.append(start)
        sizes.append(max(0, min(size, spec.stored_shape[dim] - start)))
    return Box(tuple(offsets), tuple(sizes))


class _ReshardSource:
    """Pieces of new boxes, put together from those of the old checkpoint, each of which is checked when it is read."""

    def __init__(self, found: Checkpoint, records: dict[str, TensorRecord]) -> None:
        self._found, self._records = found, records
        self._kept: OrderedDict[PieceRecord, Tensor] = OrderedDict()

    def pieces(self, entry: WriteItem) -> Iterator[tuple[Box, memoryview]]:
        record = self._records[entry.name]
        for box in split_box(entry.part.box, record.item_size, fmt.PIECE_BYTES):
            target = torch.empty(box.shape, dtype=fmt.DTYPES[record.dtype])
            for piece in record.pieces:
                both = piece.box.overlap(box)
                if both is not None:
                    target[both.within(box)] = self._read(record, piece)[both.within(piece.box)]
            yield box, write.as_bytes(target)

    def _read(self, record: TensorRecord, piece: PieceRecord) -> Tensor:
        if piece not in self._kept:
            tensor = torch.empty(piece.box.shape, dtype=fmt.DTYPES[record.dtype])
            read.run(self._found, [read.ReadItem(record, piece, (LocalPart(tensor, piece.box),))])
            self._kept[piece] = tensor
            while len(self._kept) > KEPT_PIECES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(piece)
        return self._kept[piece]
