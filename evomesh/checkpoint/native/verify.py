"""Verify a checkpoint: its records and file sizes, or every byte of it against its hash."""

from __future__ import annotations

from typing import Literal

from evomesh.checkpoint.native.find import Candidate, Checkpoint, open_record
from evomesh.checkpoint.native.format import (
    MAX_HEADER_BYTES,
    CheckpointError,
    FileRecord,
    piece_hash,
)
from evomesh.checkpoint.native.intact import read_until_intact, reading
from evomesh.checkpoint.native.read import ReadItem, read_items
from evomesh.storage.base import join

# "record": commit record, index and file sizes; "data": the hash of every piece too.
Depth = Literal["record", "data"]


def verify(candidate: Candidate, depth: Depth = "record") -> Checkpoint:
    """Open a candidate and verify it on this process alone.

    Raises:
        CheckpointError: naming the file, and the tensor if the damage is in one.
    """
    checkpoint = open_records(candidate)
    verify_records(checkpoint)
    if depth == "data":
        verify_data(checkpoint)
    return checkpoint


def open_records(candidate: Candidate) -> Checkpoint:
    """Read the commit record and the index of a candidate, and check both hashes.

    Raises:
        CheckpointError: naming the file.
    """
    with reading("the checkpoint", candidate.folder):
        return open_record(candidate.storage, candidate.folder).with_index()


def verify_records(checkpoint: Checkpoint, share: int = 0, shares: int = 1) -> None:
    """Check what the records say of a share of the data files and of the tensors.

    Args:
        share, shares: rank 1 of 8 looks at files 1, 9, 17 and so on, so that the ranks of
            a job ask a store for each file once.

    Raises:
        CheckpointError: naming the file or the tensor.
    """
    with reading("the checkpoint", checkpoint.folder):
        checkpoint.check_sizes(share, shares)
        checkpoint.index().check(share, shares)
        # Both are decoded once here, so that an odd one counts as damage and not as a
        # fault of whoever uses it.
        _ = checkpoint.state, checkpoint.config


def verify_data(checkpoint: Checkpoint, share: int = 0, shares: int = 1) -> None:
    """Compare every byte of a share of the data files with its hash.

    ``verify_records`` of all shares comes first.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    with reading("the checkpoint", checkpoint.folder):
        _verify_data(checkpoint, share, shares)


def _verify_data(checkpoint: Checkpoint, share: int, shares: int) -> None:
    index = checkpoint.index()
    items = []
    for record in index.records_of_files(share, shares):
        for piece in record.pieces:
            item = ReadItem(record, piece)
            items.append(item)
    header_bytes = _header_bytes(items)
    for number, size in header_bytes.items():
        file = checkpoint.files[number]
        _verify_header(checkpoint, file, size)
    read_items(checkpoint, items)


def _header_bytes(items: list[ReadItem]) -> dict[int, int]:
    """Return the length of each file's header, by the number of the file."""
    # The header of a file ends where its first piece begins. It has a hash in the commit
    # record, since no piece covers it: other programs find the tensors by it alone.
    first_starts: dict[int, int] = {}
    for item in items:
        file = item.piece.file
        start = item.piece.start
        lowest = first_starts.get(file, start)
        first_starts[file] = min(lowest, start)
    return first_starts


def _verify_header(checkpoint: Checkpoint, file: FileRecord, size: int) -> None:
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file.name}: a header of {size} bytes",
            where=checkpoint.folder,
            code="EVO-CKPT-003",
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
                code="EVO-CKPT-003",
            )

    read_until_intact(path, read)
