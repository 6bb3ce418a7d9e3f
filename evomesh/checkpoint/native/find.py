"""Which checkpoints there are, and which one a path means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.json_codec import decode_json
from evomesh.storage.base import Storage, join
from evomesh.storage.urls import open_storage

SNAPSHOTS = "snapshot"  # folder of the snapshots inside the save folder
NAMED = 8  # steps or names in a message
LOOKED = 32  # neighbours of a wrong path that are searched for steps; in a store, each costs two requests


@dataclass(frozen=True)
class Candidate:
    """A step folder; without a commit record it is what an interrupted save left behind."""

    storage: Storage
    folder: str
    step: int
    committed: bool


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose records verify."""

    storage: Storage
    folder: str
    body: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.body["step"])

    @property
    def attempt(self) -> str:
        return str(self.body["attempt"])

    @property
    def files(self) -> list[tuple[str, int]]:
        return [(name, size) for name, size, _ in self.body["files"]]

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = decode_json(self.body["state"])
        return state

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = decode_json(self.body["config"])
        return config

    def index(self) -> bytes:
        """The index's bytes, checked against the commit record."""
        name, size = self.body["index"]["file"], self.body["index"]["bytes"]
        data = _read(self.storage, self.folder, name, size)
        if fmt.sha256(data) != self.body["index"]["sha256"]:
            raise CheckpointError(f"{name} does not match the hash in {fmt.COMMIT}", where=self.folder)
        return data

    def records(self) -> dict[str, fmt.TensorRecord]:
        """All tensors by name."""
        try:
            return {record.name: record for record in fmt.iter_records(self.index(), self.files)}
        except CheckpointError as error:
            raise CheckpointError(error.found, where=self.folder) from None


def _read(storage: Storage, folder: str, name: str, size: int) -> bytes:
    path = join(folder, name)
    try:
        actual = storage.size(path)
    except FileNotFoundError:
        raise CheckpointError(f"{name} is missing", where=folder) from None
    if actual != size:
        raise CheckpointError(f"{name} has {actual} bytes, the commit record says {size}", where=folder)
    return storage.read(path, 0, size)


def candidates(storage: Storage, root: str) -> list[Candidate]:
    """Step folders directly in ``root``, newest step first."""
    found = []
    for name in storage.list(root):
        match = fmt.FOLDER.match(name.rstrip("/"))
        if match and name.endswith("/"):
            folder = join(root, name)
            found.append(Candidate(storage, folder, int(match[1]), storage.exists(join(folder, fmt.COMMIT))))
    return sorted(found, key=lambda c: (c.step, c.folder), reverse=True)


def open_checkpoint(storage: Storage, folder: str) -> Checkpoint:
    """Verifies the commit record, and that every file it names is there with its size.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        data = storage.read(join(folder, fmt.COMMIT))
    except FileNotFoundError:
        left = ", ".join(storage.list(folder)) or "no files"
        raise CheckpointError(f"no {fmt.COMMIT}: an interrupted save ({left})", where=folder) from None
    except OSError as error:
        raise CheckpointError(
            f"{fmt.COMMIT} cannot be read: {error.strerror or error}", where=folder
        ) from None
    try:
        body = fmt.unseal(data)
    except CheckpointError as error:
        raise CheckpointError(error.found, where=folder) from None
    found = Checkpoint(storage, folder, body)
    for name, size in [*found.files, (body["index"]["file"], body["index"]["bytes"])]:
        try:
            actual = storage.size(join(folder, name))
        except FileNotFoundError:
            rank = re.search(r"-r(\d+)\.", name)
            whose = f" (written by rank {int(rank[1])} of layout {_layout(body)})" if rank else ""
            raise CheckpointError(f"{name} is missing{whose}", where=folder) from None
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror or error}", where=folder) from None
        if actual != size:
            raise CheckpointError(f"{name} has {actual} bytes, the commit record says {size}", where=folder)
    return found


def _layout(body: dict[str, Any]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in body.get("layout", {}).items())


def newest(
    choices: Iterable[Candidate], verify: Callable[[Candidate], Checkpoint], report: Callable[[str], None]
) -> Checkpoint | None:
    """The first choice that verifies; reports each one that does not.

    Raises:
        CheckpointError: there are committed checkpoints and none of them verifies (never a silent fresh start).
    """
    skipped: list[str] = []
    refused = False
    for choice in choices:
        try:
            found = verify(choice)
        except CheckpointError as error:
            refused = refused or choice.committed
            skipped.append(f"{choice.folder}: {error.found}")
            continue
        for reason in skipped:
            report(f"skipped {reason}")
        if skipped:
            report(f"using {found.folder}")
        return found
    if refused:
        raise CheckpointError(
            "no checkpoint verifies:\n  " + "\n  ".join(skipped),
            fix="repair one of them, or train into another save_ckpt_folder to start from scratch",
        )
    for reason in skipped:
        report(f"ignored {reason}")
    return None


@dataclass(frozen=True)
class CheckpointLookup:
    """What a path means: candidate folders, newest first, and the text for an error."""

    choices: list[Candidate]
    problem: str = ""
    fix: str = ""


def everything(storage: Storage, root: str) -> list[Candidate]:
    """Normal checkpoints and snapshots of a save folder, newest step first."""
    normal = candidates(storage, root)
    extra = candidates(storage, join(root, SNAPSHOTS))
    return in_order(normal, extra)


def in_order(normal: list[Candidate], snapshots: list[Candidate]) -> list[Candidate]:
    """Newest step first; a normal checkpoint wins a tie, since a sort keeps the order of equals."""
    return sorted([*normal, *snapshots], key=lambda c: c.step, reverse=True)


def locate(url: str) -> CheckpointLookup:
    """Understands the documents' path forms: ``ROOT``, ``ROOT/49``, ``ROOT/snapshot/1/`` and our own step folders."""
    storage, path = open_storage(url)
    parent, _, name = path.rpartition("/")
    match = fmt.FOLDER.match(name)
    if match and storage.list(path):
        return CheckpointLookup(
            [Candidate(storage, path, int(match[1]), storage.exists(join(path, fmt.COMMIT)))]
        )
    inside = everything(storage, path)
    if inside:
        return CheckpointLookup(inside)
    if name.isdigit():
        if parent.rpartition("/")[2] == SNAPSHOTS:
            return _or_nothing(storage, parent, candidates(storage, parent), url)
        choices = [c for c in everything(storage, parent or ".") if c.step == int(name)]
        return _or_nothing(storage, parent or ".", choices, url)
    return _or_nothing(storage, path if storage.list(path) else (parent or "."), [], url)


def _or_nothing(storage: Storage, near: str, choices: list[Candidate], url: str) -> CheckpointLookup:
    if choices:
        return CheckpointLookup(choices)
    steps = _steps(storage, near)
    there = f"{near} has {steps}" if steps else _beside(storage, near, url)
    return CheckpointLookup([], f"no checkpoint at {url!r}; {there}", "give an existing step or folder")


def _steps(storage: Storage, folder: str) -> str:
    """ "steps 40, 30, 20", newest first; "" where none is committed."""
    steps = [str(c.step) for c in everything(storage, folder) if c.committed]
    more = f" and {len(steps) - NAMED} older" if len(steps) > NAMED else ""
    return f"steps {', '.join(steps[:NAMED])}{more}" if steps else ""


def _beside(storage: Storage, near: str, url: str) -> str:
    """What lies in the folder itself; else the neighbours that may have been meant: save folders and like names."""
    path, names = open_storage(url)[1], storage.list(near)
    if near == path:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"it holds {', '.join(names[:NAMED])}{more}, but no step folder"
    own = path.rpartition("/")[2]
    folders = [name.rstrip("/") for name in names if name.endswith("/") and name != f"{own}/"]
    close = difflib.get_close_matches(own, folders, n=3)
    looked = [*close, *(folder for folder in folders if folder not in close)][:LOOKED]
    saves = {folder: _steps(storage, join(near, folder)) for folder in looked}
    meant = [f"{folder} with {saves[folder]}" if saves[folder] else folder for folder in looked]
    meant = [words for folder, words in zip(looked, meant, strict=True) if saves[folder] or folder in close][
        :3
    ]
    where = "the current folder" if near == "." else near
    state = "the folder is empty" if f"{own}/" in names else f"{where} has no such folder"
    return f"{state}; beside it: {'; '.join(meant)}" if meant else state


def resolve(url: str, verify: Callable[[Candidate], Checkpoint], report: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint that ``url`` means and that verifies.

    Raises:
        CheckpointError: nothing there (says what lies beside it), only interrupted saves, or none that verifies.
    """
    return choose(url, locate(url), verify, report)


def choose(
    url: str,
    place: CheckpointLookup,
    verify: Callable[[Candidate], Checkpoint],
    report: Callable[[str], None],
) -> Checkpoint:
    """``resolve`` behind ``locate``."""
    if not place.choices:
        raise CheckpointError(place.problem, fix=place.fix)
    found = newest(place.choices, verify, report)
    if found is None:
        lines = "".join(
            f"\n  {c.folder}: {', '.join(c.storage.list(c.folder)) or 'empty'}" for c in place.choices
        )
        raise CheckpointError(
            f"{url!r} holds only interrupted saves, none with a {fmt.COMMIT}:{lines}",
            fix="give an older checkpoint, or start from scratch without a load path",
        )
    return found
