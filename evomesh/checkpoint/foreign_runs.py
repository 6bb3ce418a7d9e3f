"""Resume from what another system left in the save folder: InternEvo's checkpoints, or XTuner's."""

from __future__ import annotations

from evomesh.checkpoint import detect
from evomesh.checkpoint.deepspeed.find import find_checkpoint
from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.intact import reading
from evomesh.checkpoint.start_point import COUNTED, EVERYTHING, StartPoint
from evomesh.config.start_anew import start_anew
from evomesh.storage.base import join

NO_MOMENTS = "its optimizer state is not read: AdamW's moments start anew"


def newest_of_other_systems(folder: SaveFolder, note: str) -> StartPoint | None:
    """Return the newest checkpoint of InternEvo or XTuner in a save folder; None if there is none.

    Args:
        note: for the end of the reason.
    Raises:
        CheckpointError: there is one, and it cannot be read from there.
    """
    found = newest_of_internevo(folder, note)
    return _newest_of_xtuner(folder, note) if found is None else found


def _newest_of_xtuner(folder: SaveFolder, note: str) -> StartPoint | None:
    if not detect.holds_xtuner(folder.storage, folder.root):
        return None
    if folder.storage.remote:
        raise CheckpointError(
            "the save folder holds checkpoints of XTuner, which are read from a disk only",
            where=folder.root,
            expected="checkpoints of evomesh",
            fix="copy the newest one to a disk, and start from it: --resume PATH",
            code="EVO-CKPT-009",
        )
    newest = find_checkpoint(f"local:{folder.root}")
    reason = f"resuming XTuner's checkpoint {newest} (auto_resume){note}; {NO_MOMENTS}"
    return StartPoint(
        reason, path=f"local:{newest}", ckpt_type="xtuner", content=COUNTED
    )


def newest_of_internevo(folder: SaveFolder, note: str) -> StartPoint | None:
    """Return InternEvo's newest checkpoint in a save folder, all of it; None if there is none.

    Raises:
        CheckpointError: it cannot be read from there.
    """
    with reading("the folder", folder.root):
        steps = detect.internevo_steps(folder.storage, folder.root)
        snapshots = detect.internevo_snapshots(folder.storage, folder.root)
    if not steps and not snapshots:
        return None
    # A save folder with checkpoints of InternEvo must never look like an empty one:
    # what cannot be resumed from is refused, with a way out.
    newest = join(folder.root, str(steps[0])) if steps else snapshots[-1]
    if not steps or folder.storage.remote:
        found = (
            f"InternEvo's checkpoint {newest}"
            if steps
            else "snapshots of InternEvo and no checkpoint"
        )
        raise CheckpointError(
            f"the save folder holds {found}, which auto_resume cannot read",
            where=folder.root,
            expected="checkpoints of evomesh, or InternEvo's on a disk",
            fix=f"start from it: {_start_from(newest)} (a folder in a store must be copied to a disk first); or set "
            "another save_ckpt_folder to start from scratch",
            code="EVO-CKPT-009",
        )
    missing = sorted(
        {"context.pt", "sampler.pt", "schedulder.pt"} - set(folder.storage.list(newest))
    )
    if missing:
        raise CheckpointError(
            f"InternEvo's newest checkpoint has no {', '.join(missing)}: it cannot resume a run",
            where=newest,
            expected="a complete checkpoint of InternEvo",
            fix=f"start from its weights: {_start_from(newest, 'model')}; remove the folder to "
            "resume from the one before it; or set another save_ckpt_folder to start from scratch",
            code="EVO-CKPT-008",
        )
    reason = f"resuming InternEvo's checkpoint {newest} (auto_resume){note}"
    return StartPoint(
        reason, path=f"local:{newest}", ckpt_type="internevo", content=EVERYTHING
    )


def _start_from(folder: str, content: str = "all") -> str:
    return start_anew(folder, (content,), "internevo")
