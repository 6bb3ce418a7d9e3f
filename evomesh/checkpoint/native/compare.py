"""Compare two checkpoints, and find values that are not finite; for inspection only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import Box, split_box
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import TensorRecord
from evomesh.checkpoint.native.read import read_tensor
from evomesh.checkpoint.native.write import not_finite

COMPARED_BYTES = 16 << 20  # of a tensor at a time


def differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Yield one line for each difference; none if a run could not tell the two apart."""
    for section, before, after in (
        ("config", a.config, b.config),
        ("state", a.state, b.state),
    ):
        for line in _changed_values(before, after):
            yield f"{section}.{line}"
    first, second = a.records(), b.records()
    for name in sorted(set(first) | set(second)):
        if name not in second:
            yield f"{name}: only in {a.folder}"
        elif name not in first:
            yield f"{name}: only in {b.folder}"
        elif first[name].described != second[name].described:
            yield f"{name}: {first[name].described} -> {second[name].described}"
        else:
            count, largest = _unequal_elements(a, first[name], b, second[name])
            if count:
                yield f"{name}: {count} elements differ by up to {largest:.3g}"


def _changed_values(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yield ``KEY.KEY: before -> after`` for each value that differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        prefix = f"{path}." if path else ""
        keys = sorted({*a, *b})
        for key in keys:
            before = a.get(key)
            after = b.get(key)
            yield from _changed_values(before, after, prefix + key)
        return
    # NaN is not equal to itself, but its text is.
    old = repr(a)
    new = repr(b)
    if a != b and old != new:
        yield f"{path}: {old:.60} -> {new:.60}"


def _unequal_elements(
    a: Checkpoint,
    first: TensorRecord,
    b: Checkpoint,
    second: TensorRecord,
) -> tuple[int, float]:
    """Count the elements whose bits differ, and find the largest difference."""
    # Equal hashes of equal boxes prove equality without reading any data.
    whole = Box.whole(first.shape)
    is_equal = _hashes(first) == _hashes(second)
    if is_equal or whole.numel == 0:
        return 0, 0.0
    count = 0
    largest = 0.0
    for box in split_box(whole, first.item_size, COMPARED_BYTES):
        x = read_tensor(a, first, box)
        y = read_tensor(b, second, box)
        # As bits, so that two equal NaNs do not differ.
        unequal_bytes = _element_bytes(x) != _element_bytes(y)  # [elements, bytes]
        differs = unequal_bytes.any(1)
        count += int(differs.sum())
        difference = x.double() - y.double()
        distance = difference.abs().max()
        largest = max(largest, float(distance))
    return count, largest


def _hashes(record: TensorRecord) -> list[tuple[Box, str]]:
    return [(piece.box, piece.digest) for piece in record.pieces]


def _element_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, one row for each element."""
    return tensor.reshape(-1).view(torch.uint8).view(-1, tensor.element_size())


def tensors_not_finite(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield one line for each tensor with NaN or infinity in it."""
    for record in checkpoint.records().values():
        if not fmt.DTYPES[record.dtype].is_floating_point:
            continue
        bad = sum(
            not_finite(read_tensor(checkpoint, record, piece.box))
            for piece in record.pieces
        )
        if bad:
            yield f"{record.name}: {bad} values are NaN or infinite"
