"""Find checkpoints, and those that a path means."""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.format import (
    CheckpointError,
    CommitRecord,
    FileRecord,
    TensorRecord,
)
from evomesh.checkpoint.native.index import TensorIndex
from evomesh.checkpoint.native.intact import read_until_intact, reading
from evomesh.checkpoint.native.unfinished import is_marked
from evomesh.config.folders import shared_role
from evomesh.config.json_codec import decode_json
from evomesh.errors import UserError
from evomesh.storage.base import Storage, join
from evomesh.storage.urls import open_storage

logger = logging.getLogger(__name__)
SNAPSHOTS = "snapshot"  # folder of the snapshots in the save folder
SHOWN = 8  # steps or names in an error message
SEARCHED = 32  # folders next to a wrong path that are searched for steps; in a store, each costs two requests
SUGGESTED = 3  # of them in an error message


@dataclass(frozen=True)
class Candidate:
    """A step folder; one that is not committed is what an interrupted save left."""

    storage: Storage
    folder: str
    step: int
    committed: bool


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose records verify.

    Attributes:
        index_data: content of the index, if it is in memory.
    """

    storage: Storage
    folder: str
    record: CommitRecord
    index_data: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def attempt(self) -> str:
        return self.record.attempt

    @property
    def files(self) -> tuple[FileRecord, ...]:
        return self.record.files

    @property
    def state(self) -> dict[str, Any]:
        """Everything the run stored besides tensors and config."""
        state: dict[str, Any] = decode_json(self.record.state)
        return state

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config of the run, without secrets."""
        config: dict[str, Any] = decode_json(self.record.config)
        return config

    def index(self) -> TensorIndex:
        """Return the index, read from the folder unless it came with the record."""
        data = self.index_data
        if data is None:
            data = self._read_index()
        return TensorIndex(data, self.record, self.folder)

    def with_index(self) -> Checkpoint:
        """Return the checkpoint with its index in memory, checked against the commit record.

        Raises:
            CheckpointError: the index is absent, of another size, or damaged.
        """
        index = self.record.index
        _check_size(self, index.file, index.size)
        return replace(self, index_data=self._read_index())

    def _read_index(self) -> bytes:
        index = self.record.index

        def read() -> bytes:
            with reading(index.file, self.folder):
                data = self.storage.read(join(self.folder, index.file), 0, index.size)
            if fmt.sha256(data) != index.sha256:
                raise CheckpointError(
                    f"{index.file} does not match the hash in {fmt.COMMIT}",
                    where=self.folder,
                    code="EVO-CKPT-002",
                )
            return data

        return read_until_intact(join(self.folder, index.file), read)

    def records(self, wanted: Collection[str] | None = None) -> dict[str, TensorRecord]:
        """Return the records of the tensors of these names, or of all.

        Raises:
            CheckpointError: a line that does not fit its data files, or a tensor that is listed twice.
        """
        return self.index().records(wanted)

    def check_sizes(self, share: int = 0, shares: int = 1) -> None:
        """Check the sizes of this share of the data files.

        Sizes cost one request each and find what goes wrong most often: a copy that was
        interrupted. Bytes are read by ``verify`` only.

        Raises:
            CheckpointError: naming the file that is absent or has another size.
        """
        for file in self.files[share::shares]:
            _check_size(self, file.name, file.size)


def open_record(storage: Storage, folder: str) -> Checkpoint:
    """Read the commit record, and check that it is of the step in the folder's name.

    Raises:
        CheckpointError: absent, damaged, or of another step.
    """
    record = _read_commit_record(storage, folder)
    _, _, name = folder.rpartition("/")
    named_step = fmt.FOLDER.match(name)
    if named_step and int(named_step[1]) != record.step:
        raise CheckpointError(
            f"the folder is named after step {int(named_step[1])}, but {fmt.COMMIT} is of step {record.step}",
            where=folder,
            fix=f"rename the folder to {fmt.folder_name(record.step)}",
            code="EVO-CKPT-002",
        )
    return Checkpoint(storage, folder, record)


def open_checkpoint(storage: Storage, folder: str) -> Checkpoint:
    """Read the commit record, and check the sizes of the files that it names.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    checkpoint = open_record(storage, folder)
    checkpoint.check_sizes()
    index = checkpoint.record.index
    _check_size(checkpoint, index.file, index.size)
    return checkpoint


def _why_uncommitted(names: Sequence[str]) -> str:
    """Say what a step folder without a commit record is, as far as its files show."""
    reason = f"no {fmt.COMMIT}: an interrupted save"
    if names and not is_marked(names):
        reason += ", or a checkpoint that lost its record"
    return f"{reason} ({', '.join(names) or 'no files'})"


def _read_commit_record(storage: Storage, folder: str) -> CommitRecord:
    path = join(folder, fmt.COMMIT)

    def read() -> CommitRecord:
        with reading(fmt.COMMIT, folder):
            size = storage.size(path)
            if size > fmt.MAX_COMMIT_BYTES:
                raise CheckpointError(
                    f"{fmt.COMMIT} has {size} bytes, far more than any save writes",
                    code="EVO-CKPT-002",
                )
            return CommitRecord.from_bytes(storage.read(path, 0, size))

    try:
        if not storage.exists(path):
            raise CheckpointError(
                _why_uncommitted(storage.list(folder)), code="EVO-CKPT-002"
            )
        return read_until_intact(path, read)
    except CheckpointError as error:
        raise CheckpointError(error.found, where=folder, code="EVO-CKPT-002") from None
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}",
            where=folder,
            code="EVO-CKPT-014",
        ) from None


def _check_size(checkpoint: Checkpoint, name: str, size: int) -> None:
    folder = checkpoint.folder
    with reading(name, folder, _writer_of(name, checkpoint.record)):
        actual = checkpoint.storage.size(join(folder, name))
    if actual != size:
        raise CheckpointError(
            f"{name} has {actual} bytes, but the commit record lists {size}",
            where=folder,
            code="EVO-CKPT-004",
        )


def _writer_of(name: str, record: CommitRecord) -> str:
    """Return which rank wrote a data file, in words; "" for another file."""
    rank = re.search(r"-r(\d+)\.", name)
    if rank is None:
        return ""
    layout = " ".join(f"{axis}={length}" for axis, length in record.layout.items())
    return f" (written by rank {int(rank[1])} of layout {layout})"


def candidates(storage: Storage, root: str) -> list[Candidate]:
    """List the step folders directly in ``root``, newest step first.

    Of folders of one step, what was written last comes first.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    with reading("the folder", root):
        names = storage.list(root)
    found = []
    for name in names:
        if not name.endswith("/"):
            continue  # a file, whatever it is called
        match = fmt.FOLDER.match(name.rstrip("/"))
        if match:
            step = int(match[1])
            candidate = _candidate(storage, join(root, name), step)
            found.append(candidate)
    return _newest_first(found)


def _newest_first(found: list[Candidate]) -> list[Candidate]:
    """Sort by step, and folders of one step by the time of their commit records.

    A run that redoes a committed step appends its attempt, a random name, to the
    folder's: the names say nothing of the order. Records are read of such steps only.
    """
    folders_of_step = Counter(candidate.step for candidate in found)

    def age(candidate: Candidate) -> tuple[int, str, str]:
        is_redone = folders_of_step[candidate.step] > 1
        written = _time_written(candidate) if is_redone else ""
        return candidate.step, written, candidate.folder

    return sorted(found, key=age, reverse=True)


def _time_written(candidate: Candidate) -> str:
    """Return the UTC time of a commit record; "" if there is none that can be read."""
    try:
        return _read_commit_record(candidate.storage, candidate.folder).created
    except UserError:
        return ""


def _candidate(storage: Storage, folder: str, step: int) -> Candidate:
    try:
        committed = storage.exists(join(folder, fmt.COMMIT))
    except OSError:
        # Nobody may look into it, so it must count as a checkpoint: a resume reports it
        # instead of starting from scratch beside it, and retention does not delete it.
        committed = True
    return Candidate(storage, folder, step, committed)


@dataclass(frozen=True)
class SaveFolder:
    """The folders a run saves to: ``root`` for checkpoints, another one for snapshots.

    The two may be in different stores.
    """

    storage: Storage
    root: str
    snapshot_storage: Storage
    snapshot_root: str

    @staticmethod
    def open(url: str, snapshots: str | None = None) -> SaveFolder:
        """Return the folder that the user typed.

        Args:
            url: ``llm_ckpts``, ``local:llm_ckpts`` or a folder in a store.
            snapshots: of the snapshots, by default ``{url}/snapshot``.

        Raises:
            UserError: an unknown prefix, or a store that cannot be used.
        """
        if snapshots is not None:
            _refuse_shared_folder(url, snapshots)
        storage, root = open_storage(url)
        snapshot_storage, snapshot_root = open_storage(
            snapshots or join(url, SNAPSHOTS)
        )
        return SaveFolder(storage, root, snapshot_storage, snapshot_root)

    def lookup(self) -> CheckpointLookup:
        """Look up all that the folder holds."""
        return CheckpointLookup(self.storage, self.candidates())

    def candidates(self) -> list[Candidate]:
        """List the step folders of checkpoints and snapshots, newest step first.

        Those of interrupted saves are included.
        """
        normal = candidates(self.storage, self.root)
        try:
            snapshots = candidates(self.snapshot_storage, self.snapshot_root)
        except CheckpointError as error:
            logger.warning("snapshots are left out: %s", error.found)
            snapshots = []
        # Of the same step a normal checkpoint comes first, because sorting keeps the
        # order of equals.
        return sorted(
            [*normal, *snapshots], key=lambda candidate: candidate.step, reverse=True
        )


def _refuse_shared_folder(save: str, snapshots: str) -> None:
    reason = shared_role(save, snapshots)
    if reason:
        raise UserError(
            f"the snapshot folder {snapshots!r} is {reason}, {save!r}",
            expected="a separate folder for snapshots, of which only the newest two are kept",
            fix="remove ckpt.snapshot_ckpt_folder: snapshots then go to {save_ckpt_folder}/snapshot",
            code="EVO-CONFIG-016",
        )


def all_candidates(storage: Storage, root: str) -> list[Candidate]:
    """List checkpoints and snapshots of a save folder, newest step first."""
    return SaveFolder(storage, root, storage, join(root, SNAPSHOTS)).candidates()


@dataclass(frozen=True)
class CheckpointLookup:
    """The candidates that a path means, newest first, or the text of an error if there are none."""

    storage: Storage
    candidates: list[Candidate]
    problem: str = ""
    fix: str = ""


def locate(url: str, storage: Storage | None = None) -> CheckpointLookup:
    """Find the candidates that a path means.

    Args:
        url: a save folder ``ROOT``, a step in it ``ROOT/49``, its newest snapshot ``ROOT/snapshot/1/`` (the forms of
            InternEvo's guide), or a step folder ``ROOT/step-00000049``.
        storage: that of ``url``, if it is already open.

    Raises:
        CheckpointError: a folder that cannot be listed.
    """
    opened, path = open_storage(url)
    with reading("the folder", path):
        return _locate(storage or opened, path, url)


def _locate(storage: Storage, path: str, url: str) -> CheckpointLookup:
    before, _, name = path.rpartition("/")
    parent = before or "."
    # 1. ROOT/step-00000049: that folder.
    match = fmt.FOLDER.match(name)
    if match and storage.list(path):
        step = int(match[1])
        candidate = _candidate(storage, path, step)
        return CheckpointLookup(storage, [candidate])

    # 2. ROOT: a save folder, also one whose name is a number.
    inside = all_candidates(storage, path)
    if inside:
        return CheckpointLookup(storage, inside)
    if not name.isdigit():
        has_files = bool(storage.list(path))
        near = path if has_files else parent
        return _nothing_found(storage, near, url)

    # 3. ROOT/49 or ROOT/snapshot/1.
    found = _numbered(storage, parent, int(name))
    if not found:
        return _nothing_found(storage, parent, url)
    return CheckpointLookup(storage, found)


def _numbered(storage: Storage, parent: str, number: int) -> list[Candidate]:
    """Return the candidates that InternEvo's ``PARENT/NUMBER`` means."""
    _, _, parent_name = parent.rpartition("/")
    if parent_name == SNAPSHOTS:
        # InternEvo writes its snapshots to folders 0 and 1 in turn, and its configs name
        # one of the two. Here they are named after their steps: any number means the
        # newest.
        return candidates(storage, parent)
    in_parent = all_candidates(storage, parent)
    return [candidate for candidate in in_parent if candidate.step == number]


def _nothing_found(storage: Storage, near: str, url: str) -> CheckpointLookup:
    """Return a lookup whose error lists what is in or next to the folder ``near``."""
    steps = _steps_in(storage, near)
    found = f"{near} has {steps}"
    if not steps:
        found = _contents_or_neighbors(storage, near, url)
    problem = f"no checkpoint at {url!r}; {found}"
    fix = "give an existing step or folder"
    return CheckpointLookup(storage, [], problem, fix)


def _steps_in(storage: Storage, folder: str) -> str:
    """Return "steps 40, 30, 20", newest first; "" if none is committed."""
    steps = [
        str(candidate.step)
        for candidate in all_candidates(storage, folder)
        if candidate.committed
    ]
    return f"steps {_shortened(steps, 'older')}" if steps else ""


def _shortened(names: Sequence[str], rest: str) -> str:
    more = f" and {len(names) - SHOWN} {rest}" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _contents_or_neighbors(storage: Storage, near: str, url: str) -> str:
    """Return what the folder holds, in words.

    For an absent or empty one, the folders next to it that may have been meant.
    """
    _, path = open_storage(url)
    names = storage.list(near)
    folders = [name.rstrip("/") for name in names if name.endswith("/")]
    if near == path:
        save_folders = _suggested(storage, path, "", folders)
        if save_folders:
            return f"it holds {'; '.join(save_folders)}"
        return f"it holds {_shortened(names, 'more')}, but no step folder"
    _, _, wrong = path.rpartition("/")
    if wrong in folders:
        state = "the folder is empty"
        folders.remove(wrong)
    else:
        where = "the current folder" if near == "." else near
        state = f"{where} has no such folder"
    suggested = _suggested(storage, near, wrong, folders)
    if not suggested:
        return state
    return f"{state}; next to it: {'; '.join(suggested)}"


def _suggested(
    storage: Storage, parent: str, wrong: str, folders: Sequence[str]
) -> list[str]:
    """Return the folders of a similar name, then those with checkpoints in them."""
    similar = difflib.get_close_matches(wrong, folders, n=SUGGESTED)
    others = [folder for folder in folders if folder not in similar]
    suggested = []
    for folder in [*similar, *others][:SEARCHED]:
        steps = _steps_in(storage, join(parent, folder))
        if steps:
            suggested.append(f"{folder} with {steps}")
        elif folder in similar:
            suggested.append(folder)
    return suggested[:SUGGESTED]
