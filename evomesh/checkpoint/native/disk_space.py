"""Whether the disk can hold what a run will write."""

from __future__ import annotations

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.storage.base import Storage

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def readable(size: float) -> str:
    """``1.5 GiB`` from a number of bytes."""
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {UNITS[unit]}" if unit == 0 else f"{size:.1f} {UNITS[unit]}"


def check_space(
    storage: Storage, root: str, one: int, held: int, saves: int | None = None, keep_last: int | None = None
) -> str:
    """The forecast of disk need, as one line.

    Args:
        one: bytes of one checkpoint.
        held: committed checkpoints already there.
        saves: how many the run will make, None when unknown.
        keep_last: of which retention keeps so many.

    Raises:
        CheckpointError: no room for two checkpoints, so that a new one could never be safe before the old one goes.
    """
    free = storage.free_bytes(root)
    most = saves if keep_last is None else min(saves or keep_last + 1, keep_last + 1)
    need = f", {most} of them {readable(one * most)}" if most else ""
    line = f"one checkpoint takes {readable(one)}{need}"
    if free is None:
        return line
    line += f"; {readable(free)} are free in {root}"
    if free < one * max(1, 2 - held):
        raise CheckpointError(
            f"the disk cannot hold two checkpoints: {line}",
            where=root,
            expected=f"{readable(one * max(1, 2 - held))} free",
            fix="free space, or choose another save_ckpt_folder",
        )
    if most and free < one * most:
        line += "; NOT ENOUGH for all of them: set ckpt.keep_last or free space"
    return line
