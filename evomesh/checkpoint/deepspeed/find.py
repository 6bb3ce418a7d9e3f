"""Find the checkpoint of XTuner or DeepSpeed that a path means."""

from __future__ import annotations

import re
from pathlib import Path

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.user import expand_home
from evomesh.storage.urls import split_url

STATES = re.compile(r"_(model|optim)_states\.pt$")
NAMED = re.compile(r"^(iter|epoch)_(\d+)\.pth$")
# Files that name the newest checkpoint: DeepSpeed's, by its folder's name, and
# mmengine's, by a path that may be of another machine.
POINTERS = ("latest", "last_checkpoint")
LARGEST_POINTER = 4096  # bytes


def find_checkpoint(url: str) -> Path:
    """Return the file or folder of a checkpoint: the path, or the newest one in the work folder that it names.

    Raises:
        CheckpointError: there is none, or it is not on a local disk.
    """
    scheme, path = split_url(url)
    if scheme != "local":
        raise CheckpointError(
            "a checkpoint of XTuner is read from a local disk only",
            where=url,
            fix="copy it to a local disk first",
            code="EVO-CKPT-020",
        )
    place = expand_home(path)

    # 1. A checkpoint itself.
    if place.is_file() or (place.is_dir() and _has_states(place)):
        return place
    if not place.exists():
        raise CheckpointError("no such file or folder", where=url, code="EVO-CKPT-001")

    # 2. A work folder: what its pointer names, else the highest number.
    for pointer in POINTERS:
        if (place / pointer).is_file():
            return _follow(place, pointer)
    numbered = [
        (int(match[2]), name)
        for name in (entry.name for entry in place.iterdir())
        if (match := NAMED.match(name))
    ]
    if not numbered:
        raise CheckpointError(
            "no checkpoint of XTuner or DeepSpeed",
            where=url,
            expected="iter_N.pth, or *_model_states.pt",
            code="EVO-CKPT-020",
        )
    _, newest = max(numbered)
    return place / newest


def _has_states(folder: Path) -> bool:
    return any(STATES.search(entry.name) for entry in folder.iterdir())


def _follow(folder: Path, pointer: str) -> Path:
    """Return what ``latest`` or ``last_checkpoint`` names, in this folder and nowhere else."""
    with open(folder / pointer, "rb") as file:
        text = file.read(LARGEST_POINTER).decode("utf-8", "replace").strip()
    name = Path(text).name
    is_plain = pointer == "last_checkpoint" or text == name
    target = folder / name
    if not name or not is_plain or not target.exists():
        raise CheckpointError(
            f"names {text[:200]!r}, which is not in this folder",
            where=str(folder / pointer),
            expected="the name of a checkpoint beside it",
            fix="give the path of the checkpoint itself",
            code="EVO-CKPT-020",
        )
    return target
