"""Warnings of a run that saves nothing from which a restart could resume."""

from __future__ import annotations

from evomesh.config.schema import CheckpointConfig


def saving_warning(ckpt: CheckpointConfig) -> str | None:
    """Return why nothing of a run is kept; None where checkpoints are saved."""
    if ckpt.enable_save_ckpt and ckpt.save_ckpt_folder is not None:
        return None
    if ckpt.save_ckpt_folder is None:
        key = "ckpt.save_ckpt_folder is not set"
    else:
        key = f"ckpt.enable_save_ckpt=False: {ckpt.save_ckpt_folder} is not written to"
    return f"{key}; no checkpoint is saved, and nothing of the run is kept"


def restart_warning(ckpt: CheckpointConfig) -> str | None:
    """Return why a job that is queued again would begin from its start; None where it resumes."""
    lost = saving_warning(ckpt)
    if lost is not None:
        return f"{lost}: a job that is queued again starts from step 0"
    if not ckpt.auto_resume:
        return "ckpt.auto_resume=False: a job that is queued again starts where this one does"
    return None
