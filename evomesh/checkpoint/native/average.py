"""Average the weights of several checkpoints of one model, in any layouts, with a few pieces in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import Box, LocalPart, split_box
from evomesh.checkpoint.native.commit import (
    commit,
    new_attempt,
    new_record,
    refuse_committed,
)
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError, TensorRecord
from evomesh.checkpoint.native.plan import TensorType, WriteItem, in_file_order
from evomesh.checkpoint.native.reshard import BoxReader
from evomesh.checkpoint.native.write import Pieces, as_bytes
from evomesh.config.resume_effects import compare_configs
from evomesh.storage.urls import open_storage

SHOWN = 4  # differing tensors in an error message
OPTIMIZER = "optim."


@dataclass(frozen=True)
class AveragedCheckpoint:
    """One of the checkpoints that are averaged, how much it counts, and the records of its weights."""

    checkpoint: Checkpoint
    weight: float
    records: Mapping[str, TensorRecord]

    @property
    def types(self) -> dict[str, TensorType]:
        return {
            name: TensorType(record.dtype, record.shape)
            for name, record in self.records.items()
        }


def average(
    checkpoints: Sequence[Checkpoint], weights: Sequence[float] | None, target: str
) -> str:
    """Write the weighted mean of the weights as a checkpoint without optimizer state, and return its folder.

    The sums are in float64 and rounded once. Step and config are those of the newest checkpoint.

    Args:
        weights: one for each checkpoint; only their proportions count. None: all the same.
        target: save folder to write into.

    Raises:
        CheckpointError: fewer than two, other models, damaged data, or the step is already committed in the target.
    """
    if len(checkpoints) < 2:
        raise CheckpointError(
            f"{len(checkpoints)} checkpoint to average",
            expected="two or more",
            code="EVO-CKPT-015",
        )
    factors = _checked(weights, len(checkpoints))
    sources = []
    for checkpoint, factor in zip(checkpoints, factors, strict=True):
        records = {
            name: record
            for name, record in checkpoint.records().items()
            if not name.startswith(OPTIMIZER)
        }
        sources.append(AveragedCheckpoint(checkpoint, factor, records))
    for other in sources[1:]:
        _refuse_other_model(sources[0], other)

    newest = max(sources, key=lambda source: source.checkpoint.step).checkpoint
    storage, root = open_storage(target)
    folder = refuse_committed(storage, root, newest.step)
    items = []
    for name, type in sources[0].types.items():
        part = LocalPart(torch.empty(0), Box.whole(type.shape))
        items.append(WriteItem(name, type.dtype, type.shape, part))
    averaged = [
        {"folder": source.checkpoint.folder, "weight": source.weight}
        for source in sources
    ]
    record = new_record(
        newest.step,
        new_attempt(),
        config=newest.config,
        state={"averaged": averaged},
        layout=fmt.layout_record(1),
    )
    files = [in_file_order(items)]
    mean = _WeightedMean(sources)
    commit(storage, folder, files, sources[0].types, record, mean.pieces)
    return folder


def _checked(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return how much each checkpoint counts."""
    if weights is None:
        weights = [1.0] * count
    if len(weights) != count:
        raise CheckpointError(
            f"{len(weights)} weights for {count} checkpoints",
            where="--weights",
            expected="one for each checkpoint",
            code="EVO-CKPT-015",
        )
    for weight in weights:
        if not math.isfinite(weight) or weight <= 0:
            raise CheckpointError(
                f"found {weight:g}",
                where="--weights",
                expected="positive numbers",
                fix="leave out a checkpoint that is not to count",
                code="EVO-CKPT-015",
            )
    return list(weights)


def _refuse_other_model(first: AveragedCheckpoint, other: AveragedCheckpoint) -> None:
    """Refuse to average weights of another shape, or that compute something else.

    Raises:
        CheckpointError: with the differences.
    """
    ours = first.types
    theirs = other.types
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            here = _described(ours.get(name))
            there = _described(theirs.get(name))
            lines.append(f"{name}: {here} and {there}")
    functions = compare_configs(first.checkpoint.config, other.checkpoint.config)
    lines += [
        f"{row.key}: {row.stored!r} and {row.present!r}" for row in functions.function
    ]
    if not lines:
        return
    shown = "".join(f"\n  {line}" for line in lines[:SHOWN])
    more = len(lines) - SHOWN
    if more > 0:
        shown += f"\n  and {more} more"
    raise CheckpointError(
        f"{first.checkpoint.folder} and {other.checkpoint.folder} are of different models:{shown}",
        expected="checkpoints of one model, in one dtype",
        code="EVO-CKPT-015",
    )


def _described(type: TensorType | None) -> str:
    return "absent" if type is None else f"{type.dtype}{list(type.shape)}"


class _WeightedMean:
    """The bytes of the averaged weights, piece by piece."""

    def __init__(self, sources: Sequence[AveragedCheckpoint]) -> None:
        self._sources = sources
        self._total = math.fsum(source.weight for source in sources)
        self._readers = [
            BoxReader(source.checkpoint, source.records) for source in sources
        ]

    def pieces(self, item: WriteItem) -> Pieces:
        """Yield the pieces of an item with their bytes."""
        dtype = fmt.DTYPES[item.dtype]
        whole = item.part.box
        for box in split_box(whole, dtype.itemsize, fmt.PIECE_BYTES):
            mean = self._mean(item.name, box)
            yield box, as_bytes(mean.to(dtype))

    def _mean(self, name: str, box: Box) -> Tensor:
        """Return the mean of a box of a tensor, in float64."""
        total = torch.zeros(box.shape, dtype=torch.float64)
        for number, source in enumerate(self._sources):
            record = source.records[name]
            stored = self._readers[number].assemble(record, box)
            total.add_(stored.double(), alpha=source.weight)
        return total.div_(self._total)
