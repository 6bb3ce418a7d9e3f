"""Find checkpoints, and those that a path means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.format import CheckpointError, CommitRecord, FileRecord, TensorRecord
from evomesh.config.json_codec import decode_json
from evomesh.storage.base import Storage, join
from evomesh.storage.urls import open_storage

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
    """A checkpoint whose records verify."""

    storage: Storage
    folder: str
    record: CommitRecord

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

    def index(self) -> bytes:
        """Read the index and check it against the commit record."""
        index = self.record.index
        data = _read(self.storage, self.folder, index.file, index.size)
        if fmt.sha256(data) != index.sha256:
            raise CheckpointError(f"{index.file} does not match the hash in {fmt.COMMIT}", where=self.folder)
        return data

    def records(self) -> dict[str, TensorRecord]:
        """Read the index and return all tensors by name."""
        try:
            return {record.name: record for record in fmt.parse_index(self.index(), self.files)}
        except CheckpointError as error:
            raise CheckpointError(error.found, where=self.folder) from None


def _read(storage: Storage, folder: str, name: str, size: int) -> bytes:
    path = join(folder, name)
    try:
        actual = storage.size(path)
    except FileNotFoundError:
        raise CheckpointError(f"{name} is missing", where=folder) from None
    if actual != size:
        raise CheckpointError(f"{name} has {actual} bytes, but the commit record lists {size}", where=folder)
    return storage.read(path, 0, size)


def open_checkpoint(storage: Storage, folder: str) -> Checkpoint:
    """Verify the commit record, and that every file it names is there with its size.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        data = storage.read(join(folder, fmt.COMMIT))
    except FileNotFoundError:
        names = ", ".join(storage.list(folder)) or "no files"
        raise CheckpointError(f"no {fmt.COMMIT}: an interrupted save ({names})", where=folder) from None
    except OSError as error:
        raise CheckpointError(
            f"{fmt.COMMIT} cannot be read: {error.strerror or error}", where=folder
        ) from None
    try:
        record = CommitRecord.from_bytes(data)
    except CheckpointError as error:
        raise CheckpointError(error.found, where=folder) from None
    for file in record.files:
        _check_size(storage, folder, file.name, file.size, record)
    _check_size(storage, folder, record.index.file, record.index.size, record)
    return Checkpoint(storage, folder, record)


def _check_size(storage: Storage, folder: str, name: str, size: int, record: CommitRecord) -> None:
    try:
        actual = storage.size(join(folder, name))
    except FileNotFoundError:
        rank = re.search(r"-r(\d+)\.", name)
        layout = " ".join(f"{axis}={length}" for axis, length in record.layout.items())
        writer = f" (written by rank {int(rank[1])} of layout {layout})" if rank else ""
        raise CheckpointError(f"{name} is missing{writer}", where=folder) from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}", where=folder) from None
    if actual != size:
        raise CheckpointError(f"{name} has {actual} bytes, but the commit record lists {size}", where=folder)


def candidates(storage: Storage, root: str) -> list[Candidate]:
    """List the step folders directly in ``root``, newest step first."""
    found = []
    for name in storage.list(root):
        match = fmt.FOLDER.match(name.rstrip("/"))
        if match and name.endswith("/"):
            found.append(_candidate(storage, join(root, name), int(match[1])))
    return sorted(found, key=lambda candidate: (candidate.step, candidate.folder), reverse=True)


def _candidate(storage: Storage, folder: str, step: int) -> Candidate:
    return Candidate(storage, folder, step, committed=storage.exists(join(folder, fmt.COMMIT)))


@dataclass(frozen=True)
class SaveFolder:
    """The folders a run saves to: ``root`` for checkpoints, another, maybe in another store, for snapshots."""

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
        storage, root = open_storage(url)
        snapshot_storage, snapshot_root = open_storage(snapshots or join(url, SNAPSHOTS))
        return SaveFolder(storage, root, snapshot_storage, snapshot_root)

    def candidates(self) -> list[Candidate]:
        """List the step folders of checkpoints and snapshots, newest step first, interrupted saves included."""
        normal = candidates(self.storage, self.root)
        snapshots = candidates(self.snapshot_storage, self.snapshot_root)
        # Of the same step a normal checkpoint comes first, because sorting keeps the order of equals.
        return sorted([*normal, *snapshots], key=lambda candidate: candidate.step, reverse=True)


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


def locate(url: str) -> CheckpointLookup:
    """Find the candidates that a path means.

    Args:
        url: a save folder ``ROOT``, a step in it ``ROOT/49``, its newest snapshot ``ROOT/snapshot/1/`` (the forms of
            InternEvo's guide), or a step folder ``ROOT/step-00000049``.
    """
    storage, path = open_storage(url)
    parent, _, name = path.rpartition("/")
    parent = parent or "."
    match = fmt.FOLDER.match(name)
    if match and storage.list(path):
        return CheckpointLookup(storage, [_candidate(storage, path, int(match[1]))])
    inside = all_candidates(storage, path)
    if inside:
        return CheckpointLookup(storage, inside)
    if not name.isdigit():
        near = path if storage.list(path) else parent
        return _nothing_found(storage, near, url)
    if parent.rpartition("/")[2] == SNAPSHOTS:
        found = candidates(storage, parent)
    else:
        found = [candidate for candidate in all_candidates(storage, parent) if candidate.step == int(name)]
    return CheckpointLookup(storage, found) if found else _nothing_found(storage, parent, url)


def _nothing_found(storage: Storage, near: str, url: str) -> CheckpointLookup:
    """Return a lookup whose error lists what is in or next to the folder ``near``."""
    steps = _steps_in(storage, near)
    found = f"{near} has {steps}" if steps else _contents_or_neighbors(storage, near, url)
    return CheckpointLookup(
        storage, [], f"no checkpoint at {url!r}; {found}", "give an existing step or folder"
    )


def _steps_in(storage: Storage, folder: str) -> str:
    """Return "steps 40, 30, 20", newest first; "" if none is committed."""
    steps = [str(candidate.step) for candidate in all_candidates(storage, folder) if candidate.committed]
    return f"steps {_shortened(steps, 'older')}" if steps else ""


def _shortened(names: Sequence[str], rest: str) -> str:
    more = f" and {len(names) - SHOWN} {rest}" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _contents_or_neighbors(storage: Storage, near: str, url: str) -> str:
    """Return what the folder holds; for an absent or empty one, the folders next to it that may have been meant."""
    path = open_storage(url)[1]
    names = storage.list(near)
    if near == path:
        return f"it holds {_shortened(names, 'more')}, but no step folder"
    wrong = path.rpartition("/")[2]
    if f"{wrong}/" in names:
        state = "the folder is empty"
    else:
        state = f"{'the current folder' if near == '.' else near} has no such folder"
    folders = [name.rstrip("/") for name in names if name.endswith("/") and name != f"{wrong}/"]
    suggested = _suggested(storage, near, wrong, folders)
    return f"{state}; next to it: {'; '.join(suggested)}" if suggested else state


def _suggested(storage: Storage, parent: str, wrong: str, folders: Sequence[str]) -> list[str]:
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
