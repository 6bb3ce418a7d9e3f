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
        share, shares: read the data files of this share only, since the ranks of a run
            divide them.

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
    # Rank 1 of 8 reads files 1, 9, 17 ...: the job reads each byte once, not once a rank.
    items = []
    for record in records.values():
        for piece in record.pieces:
            is_own = piece.file % shares == share
            if is_own:
                items.append(ReadItem(record, piece))
    # The header of a file ends where its first piece begins. It has a hash in the commit
    # record, since no piece covers it: other programs find the tensors by it alone.
    header_bytes: dict[int, int] = {}
    for item in items:
        file = item.piece.file
        start = item.piece.start
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
