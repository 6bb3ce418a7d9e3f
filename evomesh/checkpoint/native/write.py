"""Write a data file: the boxes of one rank, as safetensors, hashed piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import Box, Coordinates, split_box
from evomesh.checkpoint.native.format import CheckpointError, FileRecord, PieceRecord
from evomesh.checkpoint.native.plan import WriteItem
from evomesh.storage.base import Storage, join

ALIGNMENT = 64  # bytes; where the data of a file begins
# Yields the pieces of an item with their bytes, in order.
PieceSource = Callable[[WriteItem], Iterator[tuple[Box, memoryview]]]


@dataclass(frozen=True)
class WrittenFile:
    """A data file that was written: what the index must know about it.

    Attributes:
        pieces: (tensor name, piece); only ``write_index`` knows the number of the file, here it is 0.
    """

    file: FileRecord
    pieces: list[tuple[str, PieceRecord]]

    def to_json(self) -> list[Any]:
        return [
            self.file.to_json(),
            [[name, piece.to_json()] for name, piece in self.pieces],
        ]

    @staticmethod
    def from_json(value: list[Any]) -> WrittenFile:
        file, pieces = value
        return WrittenFile(
            FileRecord.from_json(file),
            [(name, PieceRecord.from_json(piece)) for name, piece in pieces],
        )


def live_pieces(item: WriteItem) -> Iterator[tuple[Box, memoryview]]:
    """Yield the pieces of a tensor in memory; at most one piece is copied at a time.

    Raises:
        CheckpointError: NaN or infinity in it: a run could not resume from such a checkpoint.
    """
    tensor, outer = item.part.tensor, item.part.box
    item_size = fmt.DTYPES[item.dtype].itemsize
    in_place = tensor.is_contiguous() and tensor.device.type == "cpu"
    memory = as_bytes(tensor) if in_place else None
    position = 0
    for piece in split_box(outer, item_size, fmt.PIECE_BYTES):
        size = piece.numel * item_size
        view = tensor[piece.within(outer)]
        bad = not_finite(view)
        if bad:
            raise CheckpointError(
                f"{item.name}{list(piece.offsets)}: {bad} of {piece.numel} values are NaN or infinite: "
                "such a state is not saved"
            )
        if memory is not None:
            yield piece, memory[position : position + size]
        else:
            yield piece, as_bytes(view.contiguous().cpu())
        position += size


def write_data(
    storage: Storage,
    folder: str,
    name: str,
    items: Sequence[WriteItem],
    source: PieceSource = live_pieces,
) -> WrittenFile:
    """Write a data file; its bytes are durable on return.

    Args:
        name: of the file.
        items: in the order of the file.
        source: where the bytes come from, by default the items' own tensors.
    """
    header = safetensors_header(
        [
            (
                item_key(i.name, i.shape, i.part.box),
                i.dtype,
                i.part.box.shape,
                i.size,
            )
            for i in items
        ]
    )
    position = len(header)
    pieces: list[tuple[str, PieceRecord]] = []
    writer = storage.create(join(folder, name))
    try:
        writer.write(header)
        for item in items:
            for box, data in source(item):
                writer.write(data)
                pieces.append(
                    (item.name, PieceRecord(0, box, position, fmt.piece_hash(data)))
                )
                position += len(data)
        writer.finish()
    finally:
        writer.abort()
    storage.sync(folder)
    return WrittenFile(FileRecord(name, position, fmt.piece_hash(header)), pieces)


def not_finite(tensor: Tensor) -> int:
    """Count the values that are NaN or infinite."""
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return 0
    # One cheap pass is almost always enough: NaN and infinity survive a sum. A sum of
    # finite values may overflow, so only then are the values looked at one by one.
    if bool(torch.isfinite(tensor.sum())):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the writable memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def safetensors_header(entries: list[tuple[str, str, Coordinates, int]]) -> bytes:
    """Return length and header of a safetensors file, padded so that the data begins at a multiple of 64 bytes.

    Args:
        entries: (key, dtype name, shape, bytes) in the order of the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, dtype, shape, size in entries:
        end = position + size
        header[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(
        header,
        separators=(",", ":"),
        ensure_ascii=False,
    )
    content = text.encode()
    # Spaces are valid JSON: they align the data without a change of the header's
    # content. 100 bytes, with the 8 of the length before them, get 20 spaces.
    padding = -(len(content) + 8) % ALIGNMENT
    content += b" " * padding
    return len(content).to_bytes(8, "little") + content


def item_key(name: str, shape: Coordinates, box: Box) -> str:
    """Return the key of a box in a safetensors file: ``NAME`` for a whole tensor, else ``NAME@first,element``."""
    return name if box.shape == shape else f"{name}@{','.join(map(str, box.offsets))}"
