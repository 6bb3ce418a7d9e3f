"""Checkpoints that a config names and that are not there, found before a run is started."""

from __future__ import annotations

from evomesh.checkpoint.hub_cache import local_folder, refuse_unknown_id
from evomesh.checkpoint.native.find import locate
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.resume import DETECTED_TYPES, WEIGHT_TYPES

FOLDER_TYPES = (*WEIGHT_TYPES, "xtuner")


def refuse_absent_path(path: str, ckpt_type: str) -> None:
    """Refuse, as the start of a run does, a local path at which there is no file or folder; no content is read.

    Raises:
        UserError: nothing is there, with what is near it.
    """
    kind = ckpt_type.lower()
    if kind in FOLDER_TYPES:
        local_folder(path)
    if kind not in DETECTED_TYPES:
        return
    refuse_unknown_id(path)
    # ROOT/49 is no folder: the one of step 49 is meant.
    lookup = locate(path)
    if not lookup.candidates:
        raise CheckpointError(lookup.problem, fix=lookup.fix, code="EVO-CKPT-001")
