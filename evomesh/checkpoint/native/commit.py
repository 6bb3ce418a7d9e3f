"""One attempt at saving, in the order that makes every crash harmless.

    write                                       killed after it, there is
    1. mark of an unfinished save, by rank 0    a folder with a mark
    2. data files, synced, on every rank        a folder without an index
    3. index, synced, by rank 0                 a folder without a commit record
    4. commit.json, made visible at once        a checkpoint
    5. (the mark is deleted)                    a checkpoint

Nobody reads a folder without a commit record. The next save of the same step writes its
files beside what is left there. Retention deletes what an interrupted save left, which it
knows by the mark: a checkpoint that lost its record and index has none, and stays.
"""

from __future__ import annotations

import datetime
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.agreement import (
    ErrorMessage,
    error_from_json,
    error_to_json,
)
from evomesh.checkpoint.native.format import (
    CheckpointError,
    CommitRecord,
    FileRecord,
    ParentRecord,
    PieceRecord,
    TensorRecord,
)
from evomesh.checkpoint.native.plan import (
    TensorType,
    WriteItem,
    check_cover,
    describe,
    in_file_order,
)
from evomesh.checkpoint.native.software import software
from evomesh.checkpoint.native.store_errors import as_checkpoint_error
from evomesh.checkpoint.native.unfinished import (
    delete_files,
    discard,
    mark,
    mark_name,
    unmark,
)
from evomesh.checkpoint.native.write import (
    PieceSource,
    WrittenFile,
    live_pieces,
    write_data,
)
from evomesh.config.json_codec import encode_json
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange, SingleProcessExchange
from evomesh.parallel.grid import Grid
from evomesh.quantities import readable
from evomesh.storage.base import Storage, join
from evomesh.storage.urls import open_storage

logger = logging.getLogger(__name__)
SHOWN_RANKS = 4  # failed ranks in an error message


def new_attempt() -> str:
    """Return a random name for one try at saving; the names of its files begin with it."""
    return secrets.token_hex(4)


def new_record(
    step: int,
    attempt: str,
    *,
    config: dict[str, Any],
    state: dict[str, Any],
    layout: dict[str, int],
    parent: ParentRecord | None = None,
    snapshot: bool = False,
) -> CommitRecord:
    """Return a commit record that names no files yet; ``commit`` completes it.

    Args:
        config: resolved config without secrets.
        state: JSON values, NaN, infinities and bytes.
        layout: see ``format.layout_record``.
    """
    return CommitRecord(
        step=step,
        attempt=attempt,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        config=encode_json(config),
        state=encode_json(state),
        layout=layout,
        parent=parent,
        snapshot=snapshot,
    )


def choose_folder(storage: Storage, root: str, step: int, attempt: str) -> str:
    """Return the folder for a checkpoint of ``step``.

    It is a new one, or what an interrupted save of that step left. Nothing is written to
    a folder that is committed, leads elsewhere or holds files of somebody else.
    """
    folder = join(root, fmt.folder_name(step))
    own_name = fmt.folder_name(step, attempt)
    own = join(root, own_name)
    is_committed = storage.exists(join(folder, fmt.COMMIT))
    # A committed step that is saved again was damaged or of another run: this one resumed
    # from an earlier step. What is there may still be wanted, so both stay.
    if is_committed or storage.is_link(folder):
        return own
    names = storage.list(folder)
    if fmt.foreign_names(names):
        return own
    if not names and _is_file(storage, folder):
        return own
    return folder


def _is_file(storage: Storage, path: str) -> bool:
    try:
        storage.size(path)
    except OSError:
        return False
    return True


def refuse_committed(storage: Storage, root: str, step: int) -> str:
    """Return the folder for a checkpoint of ``step``.

    Raises:
        CheckpointError: the step is already committed there.
    """
    folder = join(root, fmt.folder_name(step))
    if storage.exists(join(folder, fmt.COMMIT)):
        raise CheckpointError(
            f"step {step} is already committed there",
            where=folder,
            fix="choose another folder",
            code="EVO-CLI-005",
        )
    return folder


def commit(
    storage: Storage,
    folder: str,
    files: Sequence[Sequence[WriteItem]],
    tensors: Mapping[str, TensorType],
    record: CommitRecord,
    source: PieceSource = live_pieces,
) -> CommitRecord:
    """Commit a checkpoint from a single process.

    Args:
        folder: step folder, see ``choose_folder`` and ``refuse_committed``.
        files: the items of each data file; an empty file is not written.
        tensors: the types of all tensors; the items must cover each of them exactly once.
        record: from ``new_record``.
        source: where the bytes of the items come from, by default their own tensors.

    Returns:
        the complete record.

    Raises:
        CheckpointError: the disk is too small, a write failed, or the items leave a
            hole; nothing is left then.
    """
    _refuse_full_disk(storage, folder, sum(tensor.size for tensor in tensors.values()))
    numbered = dict(enumerate(files))
    try:
        return commit_together(
            storage, SingleProcessExchange(), folder, numbered, tensors, record, source
        )
    except BaseException:  # a failure, or Ctrl-C
        discard(storage, folder, record.attempt, len(files))
        raise


def commit_tensors(
    root: str,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
) -> str:
    """Commit whole tensors of this process to a save folder and return the step folder.

    Raises:
        CheckpointError: see ``commit``.
    """
    storage, path = open_storage(root)
    attempt = new_attempt()
    folder = choose_folder(storage, path, step, attempt)
    items = []
    types = {}
    for name, tensor in describe(tensors, Grid()).items():
        types[name] = TensorType(tensor.dtype, tensor.shape)
        for part in tensor.parts:
            item = WriteItem(tensor.name, tensor.dtype, tensor.shape, part)
            items.append(item)
    layout = fmt.layout_record(1)
    record = new_record(step, attempt, config=config, state=state, layout=layout)
    files = [in_file_order(items)]
    commit(storage, folder, files, types, record)
    return folder


def _refuse_full_disk(storage: Storage, folder: str, needed: int) -> None:
    free = storage.free_bytes(parent_folder(folder))
    if free is not None and free < needed:
        raise CheckpointError(
            f"the checkpoint needs {readable(needed)}, but only {readable(free)} are free",
            where=folder,
            fix="free space, or choose another folder",
            code="EVO-CKPT-012",
        )


@dataclass(frozen=True)
class _RankReport:
    """A rank's message to rank 0 after writing: its files, or why it could not write them."""

    written: list[WrittenFile]
    error: ErrorMessage | None = None

    def to_json(self) -> dict[str, Any]:
        written = [file.to_json() for file in self.written]
        return {"written": written, "error": error_to_json(self.error)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> _RankReport:
        written = [WrittenFile.from_json(file) for file in value["written"]]
        return _RankReport(written, error_from_json(value["error"]))


@dataclass(frozen=True)
class _Verdict:
    """Rank 0's message to all ranks at the end of an attempt.

    Attributes:
        error: None for success.
        removable: the commit record cannot be visible, so the files of the attempt may be deleted.
    """

    error: ErrorMessage | None = None
    removable: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"error": error_to_json(self.error), "removable": self.removable}

    @staticmethod
    def from_json(value: dict[str, Any]) -> _Verdict:
        return _Verdict(error_from_json(value["error"]), value["removable"])


def commit_together(
    storage: Storage,
    exchange: Exchange,
    folder: str,
    files: Mapping[int, Sequence[WriteItem]],
    tensors: Mapping[str, TensorType],
    record: CommitRecord,
    source: PieceSource = live_pieces,
    before_publishing: Callable[[], None] = lambda: None,
) -> CommitRecord:
    """Commit a checkpoint from all ranks of ``exchange``.

    Every rank calls it and gets the same verdict.

    Args:
        files: the items of this rank's data files by file number; numbers are unique
            over all ranks.
        tensors: the types of all tensors; used on rank 0 only.
        record: the same on every rank, from ``new_record``.
        before_publishing: called on rank 0 once all is written; raises if this job must
            not commit.

    Returns:
        the complete record on rank 0, ``record`` elsewhere.

    Raises:
        CheckpointError: on every rank, naming the ranks that failed; the files of the
            attempt are deleted again.
    """
    # 1. Rank 0 marks the folder, and every rank writes its data files and waits until
    #    they are durable.
    report = _write_files(
        storage, folder, files, record.attempt, source, marks=exchange.rank == 0
    )

    # 2. Rank 0 collects what was written, writes the index, and publishes the commit
    #    record. The gather is also the barrier: a rank sends its report once its files
    #    are durable, so there is no record before the last file.
    gathered = exchange.gather(report.to_json())
    verdict = _Verdict()
    if gathered is not None:
        reports = [_RankReport.from_json(value) for value in gathered]
        verdict, record = _finish(
            storage, folder, tensors, record, reports, before_publishing
        )

    # 3. All ranks learn the outcome; after a failure before the commit each deletes its
    #    own files.
    message = exchange.broadcast(verdict.to_json())
    verdict = _Verdict.from_json(message)
    if verdict.error is not None:
        if verdict.removable:
            names = [fmt.file_name(record.attempt, number) for number in files]
            if exchange.rank == 0:
                names.append(fmt.index_name(record.attempt))
                names.append(mark_name(record.attempt))
            delete_files(storage, folder, names)
        raise verdict.error.to_error()
    return record


def _write_files(
    storage: Storage,
    folder: str,
    files: Mapping[int, Sequence[WriteItem]],
    attempt: str,
    source: PieceSource,
    *,
    marks: bool,
) -> _RankReport:
    written = []
    try:
        storage.make_folder(folder)
        if marks:
            mark(storage, folder, attempt)
        for number, items in files.items():
            if items:
                name = fmt.file_name(attempt, number)
                file = write_data(storage, folder, name, items, source)
                written.append(file)
        # On a shared file system another rank may have made the folder: its name is
        # durable once this rank has synced the folder above it.
        storage.sync(parent_folder(folder))
    except (OSError, UserError) as error:
        # An error is reported, not raised: rank 0 waits for a message of every rank.
        failure = as_checkpoint_error(error, folder)
        return _RankReport([], ErrorMessage.of(failure))
    return _RankReport(written)


def _finish(
    storage: Storage,
    folder: str,
    tensors: Mapping[str, TensorType],
    record: CommitRecord,
    reports: Sequence[_RankReport],
    before_publishing: Callable[[], None],
) -> tuple[_Verdict, CommitRecord]:
    """Write the index and publish the record, if no rank failed; rank 0 only."""
    errors = [report.error for report in reports]
    if any(errors):
        return _Verdict(_merged(errors, folder), removable=True), record
    written = []
    for report in reports:
        written += report.written
    removable = True
    try:
        record = write_index(storage, folder, tensors, written, record)
        before_publishing()
        # From here on the commit may be visible even if the call fails: a store may have
        # stored the record and its answer may be lost. Files that a visible record names
        # must never be deleted; those of a failed commit are retention's to delete.
        removable = False
        publish(storage, folder, record)
    except (OSError, UserError) as error:
        failure = ErrorMessage.of(as_checkpoint_error(error, folder))
        others = [None] * (len(reports) - 1)
        return _Verdict(_merged([failure, *others], folder), removable), record
    unmark(storage, folder, record.attempt)
    return _Verdict(), record


def _merged(errors: Sequence[ErrorMessage | None], folder: str) -> ErrorMessage:
    """Return one error for those of the ranks, which names the ranks.

    The error of a process alone stays as it is.
    """
    failed = []
    lines = []
    for rank, error in enumerate(errors):
        if error is not None:
            failed.append(error)
            lines.append(f"rank {rank}: {error.found}")
    first = failed[0]
    if len(errors) == 1:
        return replace(first, where=first.where or folder)
    return ErrorMessage(
        found="; ".join(lines[:SHOWN_RANKS]),
        where=folder,
        expected=first.expected,
        fix=first.fix,
        exit_code=first.exit_code,
    )


def write_index(
    storage: Storage,
    folder: str,
    tensors: Mapping[str, TensorType],
    written: Sequence[WrittenFile],
    record: CommitRecord,
) -> CommitRecord:
    """Write the index of the data files and return the record that names them all.

    Raises:
        CheckpointError: a tensor is not covered exactly once.
    """
    # A piece names its file by position in the commit record, which is known here only.
    files: list[FileRecord] = []
    pieces: dict[str, list[PieceRecord]] = {name: [] for name in tensors}
    for number, file in enumerate(written):
        files.append(file.file)
        for name, piece in file.pieces:
            numbered = replace(piece, file=number)
            pieces[name].append(numbered)

    # The plan covered every tensor; this looks at what was written. Sorted by name and
    # offset, the same state in the same layout gives the same index to the byte.
    lines = []
    tensor_bytes = 0
    for name in sorted(tensors):
        dtype, shape = tensors[name]
        in_order = sorted(pieces[name], key=lambda piece: piece.box.offsets)
        check_cover(name, shape, [piece.box for piece in in_order])
        tensor = TensorRecord(name, dtype, shape, tuple(in_order))
        lines.append(tensor.to_line())
        tensor_bytes += tensors[name].size
    data = b"".join(lines)
    index = fmt.index_name(record.attempt)
    writer = storage.create(join(folder, index))
    try:
        writer.write(data)
        writer.finish()
    finally:
        writer.abort()
    storage.sync(folder)
    return replace(
        record,
        software=software(),  # it asks git: here it runs once, and in the background
        files=tuple(files),
        index=fmt.IndexRecord(index, len(data), fmt.sha256(data)),
        tensors=len(lines),
        tensor_bytes=tensor_bytes,
    )


def publish(storage: Storage, folder: str, record: CommitRecord) -> None:
    """Make the commit record appear, without replacing that of another job.

    Raises:
        CheckpointError: another job committed here.
    """
    path = join(folder, fmt.COMMIT)
    try:
        storage.publish(path, record.to_bytes(), record.attempt)
    except FileExistsError:
        other = CommitRecord.from_bytes(storage.read(path))
        if other.attempt == record.attempt:
            return  # our own write, repeated because its answer was lost
        raise CheckpointError(
            f"another job committed step {other.step} (attempt {other.attempt}, {other.created})",
            where=folder,
            expected="one job per save folder",
            fix="stop one of the two jobs, or give each its own save_ckpt_folder",
            code="EVO-CKPT-011",
        ) from None


def parent_folder(folder: str) -> str:
    """Return the folder that a step folder is in."""
    return folder.rpartition("/")[0] or "/"
