"""A disk that fails and loses power: the real one below, with every changing call recorded.

``images`` replays the calls up to any moment and builds what would be left of the folder, under five models of what a
disk keeps of data and names that were not synced.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomesh.storage.local import SystemCalls

MODELS = ("nothing lost", "data lost", "names lost", "both lost", "data torn")


class Crash(BaseException):
    """The process ends here: nobody may catch it."""


class Quick(SystemCalls):
    """Does not wait for the real disk: these tests are about the order of the calls."""

    def fsync(self, file: int) -> None:
        return

    def sync_folder(self, path: str) -> None:
        return


class Disk(Quick):
    """Args:
    fail_at: number of the call that fails, from 0; None: none.
    error: an errno, or None to end the process instead.
    """

    def __init__(
        self, fail_at: int | None = None, error: int | None = None, sticky: bool = False
    ) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fail_at, self._error, self._sticky = fail_at, error, sticky
        self._names: dict[int, str] = {}
        self.failed = False

    def _note(self, *call: Any) -> None:
        number = len(self.calls)
        if self._fail_at is not None and (
            number == self._fail_at or (self._sticky and number > self._fail_at)
        ):
            if call[0] == "write" and self._error is None:
                # A process dies in the middle of a write.
                half = bytes(call[2])[: len(call[2]) // 2]
                os.write(call[3], half)
            self.failed = True
            self.calls.append(("failed", *call[:2]))
            if self._error is None:
                raise Crash(call[:2])
            raise OSError(self._error, os.strerror(self._error), str(call[1]))
        self.calls.append(call[:3])

    def mkdir(self, path: str) -> None:
        self._note("mkdir", path)
        super().mkdir(path)

    def create(self, path: str) -> int:
        self._note("create", path)
        file = super().create(path)
        self._names[file] = path
        return file

    def write(self, file: int, data: memoryview) -> int:
        self._note("write", self._names[file], bytes(data), file)
        return super().write(file, data)

    def fsync(self, file: int) -> None:
        self._note("fsync", self._names[file])
        super().fsync(file)

    def close(self, file: int) -> None:
        # Closing always closes; a disk may still report a late error.
        super().close(file)
        self._note("close", self._names[file])

    def sync_folder(self, path: str) -> None:
        self._note("sync_folder", path.rstrip("/"))
        super().sync_folder(path)

    def link(self, source: str, target: str) -> None:
        self._note("link", source, target)
        super().link(source, target)

    def rename(self, source: str, target: str) -> None:
        self._note("rename", source, target)
        super().rename(source, target)

    def unlink(self, path: str) -> None:
        self._note("unlink", path)
        super().unlink(path)

    def rmdir(self, path: str) -> None:
        self._note("rmdir", path)
        super().rmdir(path)


@dataclass
class _File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass
class _Folder:
    names: dict[str, _File | _Folder] = field(default_factory=dict)
    synced: dict[str, _File | _Folder] = field(default_factory=dict)


class _Tree:
    def __init__(self, root: str) -> None:
        self.root, self.top = root, _Folder()

    def folder(self, path: str) -> _Folder:
        node: Any = self.top
        for part in Path(path).relative_to(self.root).parts:
            node = node.names[part]
        assert isinstance(node, _Folder)
        return node

    def apply(self, call: tuple[Any, ...]) -> None:
        kind, path = call[0], str(call[1])
        parent, name = os.path.split(path)
        if kind == "sync_folder":
            if path.startswith(self.root):
                self.folder(path).synced = dict(self.folder(path).names)
            return
        if not parent.startswith(self.root):
            return
        names = self.folder(parent).names
        if kind == "mkdir":
            names[name] = _Folder()
        elif kind == "create":
            names[name] = _File()
        elif kind in ("unlink", "rmdir"):
            names.pop(name, None)
        elif kind in ("link", "rename"):
            target = str(call[2])
            self.folder(os.path.dirname(target)).names[os.path.basename(target)] = (
                names[name]
            )
            if kind == "rename":
                del names[name]
        elif kind in ("write", "fsync"):
            file = names[name]
            assert isinstance(file, _File)
            if kind == "write":
                file.data += call[2]
            else:
                file.synced = bytes(file.data)

    def build(self, target: Path, model: str, draw: random.Random) -> None:
        _build(self.top, target, model, draw)


def _build(folder: _Folder, target: Path, model: str, draw: random.Random) -> None:
    target.mkdir(parents=True, exist_ok=True)
    names = folder.synced if model in ("names lost", "both lost") else folder.names
    for name, node in names.items():
        if isinstance(node, _Folder):
            _build(node, target / name, model, draw)
            continue
        data = node.synced if model in ("data lost", "both lost") else bytes(node.data)
        if model == "data torn" and len(node.synced) < len(data):
            keep = draw.randrange(len(node.synced), len(data))
            data = data[:keep] + b"\0" * (len(data) - keep)
        (target / name).write_bytes(data)


def digest(folder: Path) -> str:
    """The same for images with the same files and bytes."""
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        hasher.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        hasher.update(path.read_bytes() if path.is_file() else b"")
    return hasher.hexdigest()


def images(
    root: str, calls: list[tuple[Any, ...]], target: Path
) -> Iterator[tuple[int, str, Path]]:
    """(number of calls done, model, folder) for a power loss after each call."""
    draw = random.Random(0)
    tree = _Tree(root)
    for done in range(len(calls) + 1):
        for model in MODELS:
            place = target / f"{done}-{model.replace(' ', '-')}"
            tree.build(place, model, draw)
            yield done, model, place
        if done < len(calls):
            tree.apply(calls[done])
