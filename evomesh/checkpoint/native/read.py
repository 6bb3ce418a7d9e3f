"""Reads pieces by byte range, checks each against its hash, and copies what is wanted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import LocalPart
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError, PieceRecord, TensorRecord
from evomesh.checkpoint.native.plan import LocalTensor
from evomesh.checkpoint.native.write import as_bytes
from evomesh.storage.base import StorageReader, join

SHOWN = 8  # differing tensors in a message


@dataclass(frozen=True)
class ReadItem:
    """One piece to read and the local parts it goes to (none: only to verify)."""

    record: TensorRecord
    piece: PieceRecord
    targets: tuple[LocalPart, ...] = ()


def match(
    records: Mapping[str, TensorRecord], local: Mapping[str, LocalTensor], cast: bool, where: str
) -> None:
    """Checks that every wanted tensor is there, with its shape and dtype.

    Raises:
        CheckpointError: naming the missing tensors, or those that differ with both shapes.
    """
    missing = [name for name in local if name not in records]
    if missing:
        near = difflib.get_close_matches(missing[0], records, n=1, cutoff=0.7)
        hint = f"; the closest name there is {near[0]!r}" if near else ""
        raise CheckpointError(
            f"the checkpoint has no {listed(missing)}{hint}",
            where=where,
            expected="the tensors of this model",
            fix="use the model section of the run that wrote it, or leave that content out",
        )
    differing = [
        f"{name}: checkpoint has {record.described}, the model wants {wanted.dtype}[{','.join(map(str, wanted.shape))}]"
        for name, wanted in local.items()
        for record in [records[name]]
        if record.shape != wanted.shape or (record.dtype != wanted.dtype and not cast)
    ]
    if differing:
        raise CheckpointError(
            several(differing),
            where=where,
            expected="the same model shape and dtype as in the run that wrote it",
            fix="compare the model section with the one stored in the checkpoint: evomesh ckpt ls",
        )


def several(problems: list[str]) -> str:
    """The first few problems, a line each, and how many there are."""
    if len(problems) == 1:
        return problems[0]
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{len(problems)} tensors differ:\n  " + "\n  ".join(problems[:SHOWN]) + more


def listed(names: list[str]) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(repr(name) for name in names[:4])
    return f"{shown}{', ...' if len(names) > 4 else ''} ({len(names)} name{'s' if len(names) > 1 else ''})"


def refuse_unwanted(records: Mapping[str, TensorRecord], wanted: Iterable[str], where: str) -> None:
    """``wanted``: names over all ranks, since a pipeline stage never wants all."""
    extra = sorted(set(records) - set(wanted))
    if extra:
        raise CheckpointError(
            f"the checkpoint holds {listed(extra)} that this run has no place for",
            where=where,
            expected="a model and optimizer of the same layers",
            fix="load a part only (content), or use the model section of the run that wrote it",
        )


def jobs_for(records: Mapping[str, TensorRecord], local: Mapping[str, LocalTensor]) -> list[ReadItem]:
    """The pieces that hold any wanted element."""
    jobs = []
    for name, wanted in local.items():
        record = records[name]
        for piece in record.pieces:
            targets = tuple(part for part in wanted.parts if piece.box.overlap(part.box) is not None)
            if targets:
                jobs.append(ReadItem(record, piece, targets))
    return jobs


def run(found: Checkpoint, jobs: list[ReadItem]) -> int:
    """Reads the jobs in file order through one buffer and returns the number of bytes read.

    Raises:
        CheckpointError: a piece is damaged: names the tensor, the file and the bytes.
    """
    total = 0
    buffer = torch.empty(max((_size(job) for job in jobs), default=0), dtype=torch.uint8)
    memory = as_bytes(buffer)
    reader: StorageReader | None = None
    current = -1
    try:
        ordered = sorted(jobs, key=lambda job: (job.piece.file, job.piece.start))
        for job in ordered:
            if job.piece.file != current:
                if reader is not None:
                    reader.close()
                current, reader = job.piece.file, None
                reader = _open(found, job)
                starts = [
                    (j.piece.start, j.piece.start + _size(j)) for j in ordered if j.piece.file == current
                ]
                reader.expect(starts)
            size = _size(job)
            _fill(found, job, reader, memory[:size])
            _copy(job, buffer[:size])
            total += size
    finally:
        if reader is not None:
            reader.close()
    return total


def _open(found: Checkpoint, job: ReadItem) -> StorageReader:
    path = join(found.folder, found.files[job.piece.file][0])
    try:
        return found.storage.open(path)
    except OSError as error:
        raise CheckpointError(
            f"{job.record.name}: {found.files[job.piece.file][0]} cannot be opened: {error.strerror or error}",
            where=found.folder,
        ) from None


def _fill(found: Checkpoint, job: ReadItem, reader: StorageReader | None, memory: memoryview) -> None:
    assert reader is not None
    name, start = found.files[job.piece.file][0], job.piece.start
    span = f"bytes {start}..{start + len(memory)}"
    place = f"{job.record.name}: piece at {list(job.piece.box.offsets)} in {name} ({span})"
    try:
        reader.read_into(start, memory)
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{place} cannot be read: {error}", where=found.folder) from None
    digest = fmt.piece_hash(memory)
    if digest != job.piece.digest:
        raise CheckpointError(
            f"{place} does not match its hash: {digest}, recorded {job.piece.digest}", where=found.folder
        )


def _copy(job: ReadItem, data: Tensor) -> None:
    if not job.targets:
        return
    source = data.view(fmt.DTYPES[job.record.dtype]).view(job.piece.box.shape)
    for part in job.targets:
        both = job.piece.box.overlap(part.box)
        assert both is not None
        with torch.no_grad():
            part.tensor[both.within(part.box)].copy_(source[both.within(job.piece.box)])


def _size(job: ReadItem) -> int:
    return job.piece.box.numel * job.record.item_size


def verify_data(found: Checkpoint, share: int = 0, shares: int = 1) -> int:
    """Reads every piece of this share of the files and checks its hash; returns the bytes read.

    Raises:
        CheckpointError: as ``run``.
    """
    jobs = [ReadItem(r, p) for r in found.records().values() for p in r.pieces if p.file % shares == share]
    first: dict[int, int] = {}
    for job in jobs:
        first[job.piece.file] = min(first.get(job.piece.file, job.piece.start), job.piece.start)
    for number, size in first.items():
        name, _, digest = found.body["files"][number]
        if fmt.piece_hash(found.storage.read(join(found.folder, name), 0, size)) != digest:
            raise CheckpointError(
                f"{name}: its header (bytes 0..{size}) does not match its hash; the tensors behind may still be whole",
                where=found.folder,
            )
    return run(found, jobs)
