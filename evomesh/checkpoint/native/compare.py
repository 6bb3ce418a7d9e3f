"""What differs between two checkpoints, and whether one is fit to go on from: for people, not for the training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native import read
from evomesh.checkpoint.native.boxes import Box, LocalPart, split_box
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import TensorRecord
from evomesh.checkpoint.native.write import not_finite

CHUNK = 16 << 20  # bytes of a tensor compared at a time


def differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """One line for each difference; none when a run could not tell the two apart."""
    for part in ("config", "state"):
        for key in _changed(getattr(a, part), getattr(b, part)):
            yield f"{part}.{key}"
    first, second = a.records(), b.records()
    for name in sorted(set(first) | set(second)):
        if name not in second:
            yield f"{name}: only in {a.folder}"
        elif name not in first:
            yield f"{name}: only in {b.folder}"
        elif first[name].described != second[name].described:
            yield f"{name}: {first[name].described} -> {second[name].described}"
        else:
            count, largest = _unequal(a, first[name], b, second[name])
            if count:
                yield f"{name}: {count} elements differ, by {largest:.3g} at most"


def _changed(a: Any, b: Any, path: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(set(a) | set(b)):
            yield from _changed(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b and repr(a) != repr(b):
        yield f"{path}: {a!r:.60} -> {b!r:.60}"


def _unequal(a: Checkpoint, first: TensorRecord, b: Checkpoint, second: TensorRecord) -> tuple[int, float]:
    """Number of elements whose bits differ, and the largest difference."""
    same_cut = [(p.box, p.digest) for p in first.pieces] == [(p.box, p.digest) for p in second.pieces]
    if same_cut:
        return 0, 0.0
    count, largest = 0, 0.0
    whole = Box((0,) * len(first.shape), first.shape)
    for box in split_box(whole, first.item_size, CHUNK) if whole.numel else ():
        x, y = _read(a, first, box), _read(b, second, box)
        size = first.item_size
        bits = x.reshape(-1).view(torch.uint8).view(-1, size) != y.reshape(-1).view(torch.uint8).view(
            -1, size
        )
        count += int(bits.any(1).sum())
        largest = max(largest, float((x.double() - y.double()).abs().max()))
    return count, largest


def _read(found: Checkpoint, record: TensorRecord, box: Box) -> torch.Tensor:
    target = torch.empty(box.shape, dtype=fmt.DTYPES[record.dtype])
    part = LocalPart(target, box)
    read.run(
        found, [read.ReadItem(record, p, (part,)) for p in record.pieces if p.box.overlap(box) is not None]
    )
    return target


def poisoned(found: Checkpoint) -> Iterator[str]:
    """One line for each tensor with NaN or infinity in it."""
    for record in found.records().values():
        if not fmt.DTYPES[record.dtype].is_floating_point:
            continue
        bad = sum(not_finite(_read(found, record, piece.box)) for piece in record.pieces)
        if bad:
            yield f"{record.name}: {bad} values are NaN or infinite"
