"""Paths of the files that a run writes, and a check that they can be written."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from evomesh.config.schema import RunConfig
from evomesh.config.user import expand_home
from evomesh.errors import UserError


def run_folder(run: RunConfig, now: datetime) -> Path:
    """Return ``RUN/{JOB_NAME}/{mm-dd-HH.MM.SS}``, or ``--run-dir``.

    All ranks of a run must pass the same time.
    """
    if run.run_dir:
        return expand_home(run.run_dir)
    return Path("RUN") / run.job_name / now.strftime("%m-%d-%H.%M.%S")


def start_of_new_folder(run: RunConfig, now: float) -> float:
    """Return ``now``, or the next second without a run folder: two runs of a job may start within a second."""
    while not run.run_dir and run_folder(run, datetime.fromtimestamp(now)).exists():
        now += 1
    return now


def rank_name(dp: int, tp: int, pp: int, main: bool = False) -> str:
    """Return the name of a rank's log and TensorBoard folder.

    ``main_`` marks the rank that logs the loss.
    """
    prefix = "main_" if main else ""
    return f"{prefix}dp={dp}_tp={tp}_pp={pp}"


def tensorboard_folder(run: RunConfig, folder: Path, name: str) -> Path:
    """Return the folder of one rank.

    It is in the config's ``tensorboard_folder`` or the run folder's ``tensorboards``.
    """
    parent = folder / "tensorboards"
    if run.tensorboard_folder:
        parent = expand_home(run.tensorboard_folder)
    return parent / name


def check_folder(folder: Path, key: str) -> None:
    """Refuse a folder that cannot be created or written into, without creating it.

    Raises:
        UserError: names ``key``, the config key that asked for the folder.
    """
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    is_writable = os.access(nearest, os.W_OK | os.X_OK)
    if nearest.is_dir() and is_writable:
        return
    reason = "cannot be written into" if nearest.is_dir() else "is a file"
    raise UserError(
        f"{nearest} {reason}",
        where=f"{key} ({folder})",
        expected="a folder that exists or can be created",
        code="EVO-TRAIN-007",
    )
