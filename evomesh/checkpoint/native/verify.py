"""Verify a checkpoint: its records and file sizes, or every byte of it against its hash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from evomesh.checkpoint.native.find import Candidate, Checkpoint, open_checkpoint
from evomesh.checkpoint.native.format import (
    MAX_HEADER_BYTES,
    CheckpointError,
    FileRecord,
    TensorRecord,
    piece_hash,
)
from evomesh.checkpoint.native.intact import read_until_intact, reading
from evomesh.checkpoint.native.read import ReadItem, read_items
from evomesh.storage.base import join

# "record": commit record, index and file sizes; "data": the hash of every piece too.
Depth = Literal["record", "data"]


def verify(
    candidate: Candidate, depth: Depth = "record", share: int = 0, shares: int = 1
) -> Checkpoint:
    """Open a candidate and verify it.

    Args:
        share, shares: read the data files of this share only, since the ranks of a run divide them.

    Raises:
        CheckpointError: naming the file, and the tensor if the damage is in one.
    """
    with reading("the checkpoint", candidate.folder):
        checkpoint = open_checkpoint(candidate.storage, candidate.folder)
        records = checkpoint.records()
        # Both are decoded once here, so that an odd one counts as damage and not as a
        # fault of whoever uses it.
        _ = checkpoint.state, checkpoint.config
        if depth == "data":
            _verify_data(checkpoint, records, share, shares)
    return checkpoint


def _verify_data(
    checkpoint: Checkpoint, records: Mapping[str, TensorRecord], share: int, shares: int
) -> None:
    items = [
        ReadItem(record, piece)
        for record in records.values()
        for piece in record.pieces
        if piece.file % shares == share
    ]
    # The header of a file ends where its first piece begins.
    header_bytes: dict[int, int] = {}
    for item in items:
        file, start = item.piece.file, item.piece.start
        header_bytes[file] = min(header_bytes.get(file, start), start)
    for number, size in header_bytes.items():
        _verify_header(checkpoint, checkpoint.files[number], size)
    read_items(checkpoint, items)


def _verify_header(checkpoint: Checkpoint, file: FileRecord, size: int) -> None:
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file.name}: a header of {size} bytes", where=checkpoint.folder
        )
    path = join(checkpoint.folder, file.name)

    def read() -> None:
        with reading(file.name, checkpoint.folder):
            header = checkpoint.storage.read(path, 0, size)
        if piece_hash(header) != file.header_digest:
            raise CheckpointError(
                f"{file.name}: its header (bytes 0..{size}) does not match its hash; "
                "the tensors after it may be intact",
                where=checkpoint.folder,
            )

    read_until_intact(path, read)
