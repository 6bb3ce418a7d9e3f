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
# The pieces of an item with their bytes, in the order of the file.
Pieces = Iterator[tuple[Box, memoryview]]
PieceSource = Callable[[WriteItem], Pieces]


@dataclass(frozen=True)
class WrittenFile:
    """A data file that was written: what the index must know about it.

    Attributes:
        pieces: (tensor name, piece); only ``write_index`` knows the number of the file,
            here it is 0.
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


def live_pieces(item: WriteItem) -> Pieces:
    """Yield the pieces of a tensor in memory; at most one piece is copied at a time.

    Raises:
        CheckpointError: NaN or infinity in it: a run could not resume from such a checkpoint.
    """
    tensor = item.part.tensor
    outer = item.part.box
    item_size = fmt.DTYPES[item.dtype].itemsize
    # Pieces are contiguous in the bytes of their box (``split_box``). So a contiguous
    # tensor in host memory, as staging buffers are, is written without any copy; another
    # is copied a piece at a time, and a save never needs the memory of a second model.
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
                "such a state is not saved",
                code="EVO-CKPT-007",
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
    entries = []
    for item in items:
        box = item.part.box
        key = item_key(item.name, item.shape, box)
        entries.append((key, item.dtype, box.shape, item.size))
    header = safetensors_header(entries)
    position = len(header)
    pieces: list[tuple[str, PieceRecord]] = []
    writer = storage.create(join(folder, name))
    try:
        writer.write(header)
        for item in items:
            for box, data in source(item):
                # Hashed in memory, before a disk or a network had a chance to change it.
                digest = fmt.piece_hash(data)
                writer.write(data)
                piece = PieceRecord(0, box, position, digest)
                pieces.append((item.name, piece))
                position += len(data)
        writer.finish()
    finally:
        writer.abort()
    # ``finish`` made the bytes durable, this does it for the name: after a power failure
    # a file system may have the one without the other.
    storage.sync(folder)
    record = FileRecord(name, position, fmt.piece_hash(header))
    return WrittenFile(record, pieces)


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
    elements = tensor.detach().reshape(-1)
    array = elements.view(torch.uint8).numpy()
    return memoryview(array.data)


def safetensors_header(entries: list[tuple[str, str, Coordinates, int]]) -> bytes:
    """Return length and header of a safetensors file.

    It is padded so that the data begins at a multiple of 64 bytes.

    Args:
        entries: (key, dtype name, shape, bytes) in the order of the data.
    """
    #     8 bytes  length of the header, little-endian
    #     n bytes  {"__metadata__":{"format":"pt"},
    #               "w2@0,22":{"dtype":"BF16","shape":[16,21],"data_offsets":[0,672]}}
    #     then the data; offsets count from its first byte
    #
    # Older versions of transformers refuse a file without "format".
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
    """Return the key of a box in a safetensors file.

    ``NAME`` for a whole tensor, else ``NAME@first,element``.
    """
    if box.shape == shape:
        return name
    first_element = ",".join(map(str, box.offsets))
    return f"{name}@{first_element}"
