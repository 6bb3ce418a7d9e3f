"""Read pieces by byte range, check each against its hash, and copy what is wanted."""

from __future__ import annotations

import difflib
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import Box, LocalPart
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import (
    CheckpointError,
    PieceRecord,
    TensorRecord,
    describe_type,
)
from evomesh.checkpoint.native.intact import read_until_intact, reading
from evomesh.checkpoint.native.plan import LocalTensor
from evomesh.checkpoint.native.write import as_bytes, not_finite
from evomesh.storage.base import StorageReader, join

logger = logging.getLogger(__name__)
SHOWN = 8  # differing tensors in a message
SHOWN_NAMES = 4  # missing or unexpected tensors in a message


@dataclass(frozen=True)
class ReadItem:
    """One piece to read and the local parts to copy it into; without any it is only verified."""

    record: TensorRecord
    piece: PieceRecord
    targets: tuple[LocalPart, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the piece."""
        return self.piece.box.numel * self.record.item_size


def match(
    records: Mapping[str, TensorRecord],
    local: Mapping[str, LocalTensor],
    cast: bool,
    where: str,
    all_names: Callable[[], Iterable[str]] | None = None,
) -> None:
    """Check that every wanted tensor is in the checkpoint, with its shape and dtype.

    Args:
        records: those of the checkpoint, at least of the wanted tensors that it has.
        cast: the dtype may differ.
        all_names: of the checkpoint's tensors, if ``records`` are not all.

    Raises:
        CheckpointError: naming the missing tensors, or those that differ with both shapes.
    """
    missing = [name for name in local if name not in records]
    if missing:
        available = all_names() if all_names is not None else records
        refuse_missing(missing, available, where)
    differing = []
    for name, wanted in local.items():
        record = records[name]
        same_dtype = cast or record.dtype == wanted.dtype
        if record.shape != wanted.shape or not same_dtype:
            expected = describe_type(wanted.dtype, wanted.shape)
            differing.append(
                f"{name}: checkpoint has {record.described}, the model wants {expected}"
            )
    refuse_differing(differing, where)


def refuse_missing(
    missing: Sequence[str], available: Iterable[str], where: str
) -> None:
    """Refuse a checkpoint that lacks wanted tensors.

    Raises:
        CheckpointError: naming some of the missing tensors and the closest name there is.
    """
    if missing:
        close = difflib.get_close_matches(missing[0], available, n=1, cutoff=0.7)
        hint = f"; the closest name there is {close[0]!r}" if close else ""
        raise CheckpointError(
            f"the checkpoint has no {_listed(missing)}{hint}",
            where=where,
            expected="the tensors of this model",
            fix="use the model section of the run that wrote it, or leave that content out",
            code="EVO-CKPT-005",
        )


def refuse_differing(differing: Sequence[str], where: str) -> None:
    """Refuse tensors of another shape or dtype.

    Args:
        differing: one line for each such tensor.

    Raises:
        CheckpointError: with the first few lines, and how many there are.
    """
    if not differing:
        return
    found = differing[0]
    if len(differing) > 1:
        lines = [f"{len(differing)} tensors differ:", *differing[:SHOWN]]
        if len(differing) > SHOWN:
            lines.append(f"and {len(differing) - SHOWN} more")
        found = "\n  ".join(lines)
    raise CheckpointError(
        found,
        where=where,
        expected="the same model shape and dtype as in the run that wrote it",
        fix="use the model section of the run that wrote it",
        code="EVO-CKPT-005",
    )


def refuse_not_finite(name: str, stored: Tensor, values: Tensor, where: str) -> None:
    """Refuse weights with NaN or infinity.

    Args:
        stored: as the file has them.
        values: in the dtype of the model, which may hold less.

    Raises:
        CheckpointError: with their number, and whether the file or the dtype is the cause.
    """
    bad = not_finite(values)
    if not bad:
        return
    if not_finite(stored):
        fix = "take another copy of the weights: training and inference would give NaN"
    else:
        fix = "choose a dtype with a larger range, such as bfloat16"
    dtype = str(values.dtype).removeprefix("torch.")
    raise CheckpointError(
        f"{name}: {bad} of {values.numel()} values are NaN or infinite as {dtype}",
        where=where,
        expected="finite weights",
        fix=fix,
        code="EVO-CKPT-007",
    )


def refuse_unwanted(names: Iterable[str], wanted: Collection[str], where: str) -> None:
    """Refuse a checkpoint with tensors that this run does not want.

    Args:
        wanted: names over all ranks, since no pipeline stage wants all.

    Raises:
        CheckpointError: naming some of them.
    """
    extra = sorted(set(names) - set(wanted))
    if extra:
        raise CheckpointError(
            f"unexpected tensors in the checkpoint: {_listed(extra)}",
            where=where,
            expected="a model and optimizer of the same layers",
            fix="load a part only (content), or use the model section of the run that wrote it",
            code="EVO-CKPT-005",
        )


def _listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many there are."""
    shown = ", ".join(repr(name) for name in names[:SHOWN_NAMES])
    more = ", ..." if len(names) > SHOWN_NAMES else ""
    unit = "name" if len(names) == 1 else "names"
    return f"{shown}{more} ({len(names)} {unit})"


def items_for(
    records: Mapping[str, TensorRecord],
    local: Mapping[str, LocalTensor],
) -> list[ReadItem]:
    """Return the pieces that hold any wanted element."""
    items = []
    for name, wanted in local.items():
        record = records[name]
        for piece in record.pieces:
            targets = []
            for part in wanted.parts:
                both = piece.box.overlap(part.box)
                if both is not None:
                    targets.append(part)
            if targets:
                items.append(ReadItem(record, piece, tuple(targets)))
    return items


def read_tensor(
    checkpoint: Checkpoint, record: TensorRecord, box: Box | None = None
) -> Tensor:
    """Read a whole tensor, or a box of it, into memory.

    Every piece is checked against its hash.
    """
    if box is None:
        box = Box.whole(record.shape)
    dtype = fmt.DTYPES[record.dtype]
    tensor = torch.empty(box.shape, dtype=dtype)
    targets = (LocalPart(tensor, box),)
    items = []
    for piece in record.pieces:
        if piece.box.overlap(box) is not None:
            items.append(ReadItem(record, piece, targets))
    read_items(checkpoint, items)
    return tensor


def read_items(checkpoint: Checkpoint, items: Iterable[ReadItem]) -> int:
    """Read items in file order through one buffer and return the number of bytes read.

    Raises:
        CheckpointError: a piece is damaged; names the tensor, the file and the bytes.
    """
    in_order = sorted(items, key=place_in_files)
    # A piece is read whole, since its hash covers all of it, and what is wanted is copied
    # out. One buffer of at most 4 MiB serves all pieces, so that loading needs no more
    # memory than the tensors themselves.
    largest = 0
    num_bytes = 0
    for item in in_order:
        largest = max(largest, item.size)
        num_bytes += item.size
    buffer = torch.empty(largest, dtype=torch.uint8)
    with closing(PieceReader(checkpoint, in_order)) as reader:
        for item in in_order:
            data = buffer[: item.size]
            reader.read(item, data)
            copy_piece(item, data)
    return num_bytes


def place_in_files(item: ReadItem) -> tuple[int, int]:
    """Return the key by which items are sorted to be read."""
    return item.piece.file, item.piece.start


# The start and end of each.
ByteRanges = list[tuple[int, int]]


class PieceReader:
    """Reads pieces; the file of the last one stays open.

    Args:
        items: all that will be read, in file order.
    """

    def __init__(self, checkpoint: Checkpoint, items: Iterable[ReadItem]) -> None:
        self._checkpoint = checkpoint
        self._ranges = _ranges_by_file(items)
        self._file: int | None = None
        self._reader: StorageReader | None = None

    def read(self, item: ReadItem, data: Tensor) -> None:
        """Fill ``data`` with the bytes of a piece, and check their hash.

        Raises:
            CheckpointError: damaged; names the tensor, the file and the bytes.
        """
        if self._reader is None or self._file != item.piece.file:
            self.close()
            self._file = item.piece.file
            self._reader = _open(self._checkpoint, item)
            # A store can then answer many small reads with one large request.
            self._reader.expect(self._ranges[self._file])
        _read_piece(self._checkpoint, item, self._reader, as_bytes(data))

    def close(self) -> None:
        """Close the open file."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _ranges_by_file(items: Iterable[ReadItem]) -> dict[int, ByteRanges]:
    """Return the ranges that will be read of each file, by its number."""
    ranges_by_file: dict[int, ByteRanges] = defaultdict(list)
    for item in items:
        piece = item.piece
        end = piece.start + item.size
        ranges = ranges_by_file[piece.file]
        ranges.append((piece.start, end))
    return ranges_by_file


def _open(checkpoint: Checkpoint, item: ReadItem) -> StorageReader:
    name = checkpoint.files[item.piece.file].name
    with reading(f"{item.record.name}: {name}", checkpoint.folder):
        return checkpoint.storage.open(join(checkpoint.folder, name))


def _read_piece(
    checkpoint: Checkpoint, item: ReadItem, reader: StorageReader, memory: memoryview
) -> None:
    """Read a piece into ``memory`` and check its hash."""
    piece = item.piece
    path = join(checkpoint.folder, checkpoint.files[piece.file].name)
    with reading(_described(checkpoint, item), checkpoint.folder):
        reader.read_into(piece.start, memory)
    if fmt.piece_hash(memory) == piece.digest:
        return

    def read_again() -> None:
        # Not through the reader, which may hold the damaged bytes in a block that it
        # read ahead.
        with reading(_described(checkpoint, item), checkpoint.folder):
            memory[:] = checkpoint.storage.read(path, piece.start, len(memory))
        digest = fmt.piece_hash(memory)
        if digest != piece.digest:
            raise CheckpointError(
                f"{_described(checkpoint, item)} does not match its hash: {digest}, recorded {piece.digest}",
                where=checkpoint.folder,
                code="EVO-CKPT-003",
            )

    read_until_intact(path, read_again)
    logger.warning("%s arrived damaged and was read again: now its hash is right", path)


def _described(checkpoint: Checkpoint, item: ReadItem) -> str:
    """Return tensor, offsets, file and bytes of a piece in words."""
    piece = item.piece
    span = f"bytes {piece.start}..{piece.start + item.size}"
    name = checkpoint.files[piece.file].name
    return f"{item.record.name}: piece at {list(piece.box.offsets)} in {name} ({span})"


def copy_piece(item: ReadItem, data: Tensor) -> None:
    """Copy the elements that the targets want from the bytes of a piece."""
    if not item.targets:
        return
    piece = item.piece.box
    dtype = fmt.DTYPES[item.record.dtype]
    source = data.view(dtype).view(piece.shape)
    # Columns 0 to 21 are stored and the rank holds 16 to 31 of them: columns 16 to 21 of
    # the piece go to columns 0 to 5 of the local tensor.
    with torch.no_grad():
        for part in item.targets:
            both = piece.overlap(part.box)
            assert both is not None
            in_source = both.within(piece)
            in_target = both.within(part.box)
            part.tensor[in_target].copy_(source[in_source])
