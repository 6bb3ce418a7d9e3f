"""Forecast whether the disk can hold what a run will write."""

from __future__ import annotations

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.quantities import readable
from evomesh.storage.base import Storage


def check_space(
    storage: Storage,
    root: str,
    one: int,
    held: int,
    saves: int | None = None,
    keep_last: int | None = None,
) -> str:
    """Return the forecast of disk need as one line.

    Args:
        one: bytes of one checkpoint.
        held: number of committed checkpoints already there.
        saves: how many the run will make, None if unknown.
        keep_last: how many retention keeps, None for all.

    Raises:
        CheckpointError: less space than two checkpoints need, so the old one could not
            stay until the new one is safe.
    """
    free = storage.free_bytes(root)
    most = saves
    if keep_last is not None:
        # While a save is written there is one more than retention keeps.
        most = min(saves or keep_last + 1, keep_last + 1)
    line = f"one checkpoint takes {readable(one)}"
    if most and most > 1:
        line += f", {most} of them {readable(one * most)}"
    if free is None:
        return line
    line += f"; {readable(free)} are free in {root}"
    needed = one * max(1, 2 - held)
    if free < needed:
        raise CheckpointError(
            f"the disk cannot hold two checkpoints: {line}",
            where=root,
            expected=f"{readable(needed)} free",
            fix="free space, or choose another save_ckpt_folder",
            code="EVO-CKPT-012",
        )
    if most and free < one * most:
        line += "; NOT ENOUGH for all of them: set ckpt.keep_last or free space"
    return line
