"""Folders that a run exported: the mark in each, and which of them may be deleted.

    hf/hf-00000100/.evomesh-export.json             complete: the files of the folder and their sizes
    hf/.hf-00000200.1f0c2d3e.tmp/.evomesh-export... without files: being written, or left by a run that was killed
    hf/my-model/                                    no mark: somebody else's

Only a folder with a mark is ever deleted, and a complete one only while it holds exactly
the files that the export wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evomesh.checkpoint.native.retention import PIN
from evomesh.errors import UserError
from evomesh.storage.urls import split_url
from evomesh.user_files import read_text

MARK = ".evomesh-export.json"
NAME = re.compile(r"hf-([0-9]{8,18})(?:-[0-9a-f]{8})?\Z")
# What output_folder.new_folder fills, and what a deletion renames a folder to.
HIDDEN = re.compile(r"\.hf-[0-9]{8,18}(?:-[0-9a-f]{8})?\.[0-9a-f]{8}\.tmp\Z")


@dataclass(frozen=True)
class ExportMark:
    """The mark in an exported folder, which says who exported what.

    Attributes:
        run: the run that exports, as its save folder; see ``run_name``.
        attempt: of the checkpoint that was exported.
        files: path in the folder -> size in bytes; None until all are written.
    """

    run: str
    step: int
    attempt: str
    files: dict[str, int] | None = None

    def begin(self, folder: Path) -> None:
        """Mark a folder that is going to be filled."""
        self._write(folder)

    def complete(self, folder: Path) -> None:
        """Mark a folder in which every file has been written."""
        files = file_sizes(folder)
        ExportMark(self.run, self.step, self.attempt, files)._write(folder)

    def _write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1)
        (folder / MARK).write_text(text, encoding="utf-8")


def read_mark(folder: Path) -> ExportMark | None:
    """Return the mark of a folder; None if there is none that can be read."""
    try:
        text = read_text(folder / MARK)
        record: dict[str, Any] = json.loads(text)
        mark = ExportMark(**record)
    except (OSError, ValueError, TypeError, UserError):
        return None
    has_files = isinstance(mark.files, dict | None)
    has_step = isinstance(mark.step, int)
    return mark if has_files and has_step else None


def file_sizes(folder: Path) -> dict[str, int]:
    """Return path -> size of all files in a folder but its mark; -1 for anything but a plain file."""
    sizes = {}
    mark = folder / MARK
    for path in sorted(folder.rglob("*")):
        # Neither a link's own size nor that of its target says what was exported.
        status = path.lstat()
        kind = status.st_mode
        if stat.S_ISDIR(kind) or path == mark:
            continue
        is_plain = stat.S_ISREG(kind)
        name = path.relative_to(folder).as_posix()
        sizes[name] = status.st_size if is_plain else -1
    return sizes


def run_name(save_folder: str, root: Path) -> str:
    """Return what marks call a run: its save folder as seen from the folder of its exports.

    Both may be moved together. A save folder in a store is named by its URL.
    """
    scheme, path = split_url(save_folder)
    if scheme != "local":
        return save_folder
    return os.path.relpath(os.path.realpath(path), os.path.realpath(root))


def export_name(step_folder: str) -> str:
    """Return the name of an export: ``hf-00000100`` of ``step-00000100``, with the attempt if that has it."""
    name = step_folder.rpartition("/")[2]
    return "hf-" + name.removeprefix("step-")


def delete_unfinished(root: Path) -> None:
    """Delete what killed exports left. The caller is the one process that exports to ``root``."""
    for path in _entries(root):
        is_ours = HIDDEN.match(path.name) and read_mark(path) is not None
        if is_ours and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def delete_old(
    root: Path, run: str, keep: int, newest: int, warn: Callable[[str], None]
) -> list[Path]:
    """Delete all but the ``keep`` newest exports of a run, and return the folders.

    Exports of steps after ``newest`` are neither counted nor deleted: they are of a run
    that was further. Nor is one that is pinned, that is a link, or that does not hold
    exactly what was written.

    Args:
        newest: step of the export that was just finished.
        warn: called with a line on each that must stay for what it holds.
    """
    exports = _exports_of(root, run)
    up_to_newest = [path for path, mark in exports.items() if mark.step <= newest]
    # Of two exports of one step, the name decides.
    newest_first = sorted(
        up_to_newest, key=lambda path: (exports[path].step, path.name), reverse=True
    )
    deleted = []
    for path in newest_first[keep:]:
        pin = path.with_name(path.name + PIN)
        if pin.exists():
            continue
        reason = _reason_to_stay(path, exports[path])
        if reason:
            warn(f"{path} is not deleted: {reason}")
        else:
            _delete(path)
            deleted.append(path)
    return deleted


def _exports_of(root: Path, run: str) -> dict[Path, ExportMark]:
    """Return the folders that a run exported, and their marks."""
    found = {}
    for path in _entries(root):
        if NAME.match(path.name):
            mark = read_mark(path)
            if mark is not None and mark.run == run:
                found[path] = mark
    return found


def _reason_to_stay(path: Path, mark: ExportMark) -> str:
    """Return why a folder that retention does not keep must stay; "" if it may be deleted."""
    if path.is_symlink():
        return "it is a link to another place"
    if mark.files is None:
        return "its mark does not say that it is complete"
    if file_sizes(path) != mark.files:
        return "it does not hold exactly the files that were exported"
    return ""


def _delete(path: Path) -> None:
    """Delete a folder, which vanishes from its name at once."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _entries(root: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(root.iterdir())
    return []
