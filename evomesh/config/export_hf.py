"""Config section ``ckpt.export_hf``, and the rules of its values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evomesh.config.finding import ConfigFinding
from evomesh.config.folders import FolderPlace
from evomesh.config.section import Section

if TYPE_CHECKING:
    from evomesh.config.schema import CheckpointConfig

EXPORTS = "hf"  # folder of the exports in the save folder


class ExportHfConfig(Section):
    """``ckpt.export_hf``: Hugging Face folders, written while a run trains."""

    every: int | None = Field(
        None,
        ge=1,
        description="Export checkpoints whose step is a multiple of this, and the last one; None: every checkpoint.",
    )
    keep: int | None = Field(
        None, ge=1, description="Number of newest exported folders to keep; None: all."
    )
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = Field(
        None, description="Dtype of the exported weights; None: as trained."
    )
    folder: str | None = Field(
        None,
        description="Local folder of the exported folders; None: {save_ckpt_folder}/hf.",
    )


def export_folder(ckpt: CheckpointConfig) -> str | None:
    """Return the folder that exports of a run are written to; None if it exports nothing."""
    save = ckpt.save_ckpt_folder
    if not (ckpt.enable_save_ckpt and ckpt.enable_internevo2hf_ckpt) or save is None:
        return None
    return ckpt.export_hf.folder or f"{save.rstrip('/')}/{EXPORTS}"


def exports_once(ckpt: CheckpointConfig) -> bool:
    """Return whether the only checkpoint that a run exports is its last."""
    saves_once = math.isinf(ckpt.checkpoint_every) and not ckpt.checkpoint_every_epochs
    return saves_once and export_folder(ckpt) is not None


def export_findings(ckpt: CheckpointConfig) -> Iterator[ConfigFinding]:
    """Yield what keeps the exports of a run from being written."""
    folder = export_folder(ckpt)
    if folder is None:
        return
    place = FolderPlace.of(folder)
    if place.bucket:
        # A folder on a disk appears whole, by one rename. An object store has none, and
        # a killed run would leave half a model under the final name.
        yield ConfigFinding(
            ("ckpt.export_hf.folder", "ckpt.save_ckpt_folder"),
            f"exports would be written to {folder!r}, which is not on a local disk",
            expected="a local folder; the checkpoints themselves may be in a store",
            fix='set ckpt.export_hf.folder="hf_ckpts", or ckpt.enable_internevo2hf_ckpt=False',
            code="EVO-CONFIG-016",
        )
    if place.in_step_folder:
        yield ConfigFinding(
            ("ckpt.export_hf.folder",),
            f"{folder!r} is inside the folder of one checkpoint",
            expected="a separate folder for exports",
            fix="remove ckpt.export_hf.folder: exports then go to {save_ckpt_folder}/hf",
            code="EVO-CONFIG-016",
        )
    yield from _interval_findings(ckpt)


def _interval_findings(ckpt: CheckpointConfig) -> Iterator[ConfigFinding]:
    """Yield an interval of exports in which there are steps without a checkpoint."""
    every = ckpt.export_hf.every
    saved_every = ckpt.checkpoint_every
    is_known = saved_every >= 1 and math.isfinite(saved_every)
    if every is not None and is_known and every % saved_every != 0:
        yield ConfigFinding(
            ("ckpt.export_hf.every", "ckpt.checkpoint_every"),
            f"found {every}, and there is a checkpoint every {saved_every:g} steps",
            expected="a multiple of ckpt.checkpoint_every",
            fix="remove ckpt.export_hf.every to export every checkpoint",
            code="EVO-CONFIG-008",
        )
