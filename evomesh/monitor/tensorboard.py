"""Where a run keeps its files, and its TensorBoard scalars."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from evomesh.config.redact import redact_log
from evomesh.config.schema import RunConfig
from evomesh.errors import UserError


def run_folder(run: RunConfig, now: datetime) -> Path:
    """``RUN/{JOB_NAME}/{mm-dd-HH.MM.SS}``, or ``--run-dir``. All ranks of a run must pass the same time."""
    return Path(run.run_dir) if run.run_dir else Path("RUN") / run.job_name / now.strftime("%m-%d-%H.%M.%S")


def rank_name(dp: int, tp: int, pp: int, main: bool = False) -> str:
    """Name of a rank's log and TensorBoard folder; ``main_`` marks the one whose loss is the run's."""
    return f"{'main_' if main else ''}dp={dp}_tp={tp}_pp={pp}"


def tensorboard_folder(run: RunConfig, folder: Path, name: str) -> Path:
    """``tensorboard_folder`` of the config, or ``tensorboards`` in the run folder; then one folder a rank."""
    return (Path(run.tensorboard_folder) if run.tensorboard_folder else folder / "tensorboards") / name


def check_folder(folder: Path, key: str) -> None:
    """Refuses a folder that cannot be made or written into, and makes nothing yet.

    Raises:
        UserError: names ``key``, which asked for the folder.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written into" if there.is_dir() else "is a file"
        raise UserError(
            f"{there} {why}", where=f"{key} ({folder})", expected="a folder, existing or to be made"
        )


class TensorBoardWriter:
    """Scalars of one rank.

    Args:
        folder: of this rank. A resumed run passes the one it had.
        step: next step; what an earlier run wrote for it and later ones is hidden.
        queue: steps that are buffered before a write.
        resume_from: folder of an earlier run whose curves are copied in first.
    """

    def __init__(self, folder: Path, step: int = 0, queue: int = 10, resume_from: Path | None = None) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # slow to import, and many runs have it switched off

        if resume_from is not None and resume_from.resolve() != folder.resolve():
            shutil.copytree(resume_from, folder, dirs_exist_ok=True)
        self._writer = SummaryWriter(str(folder), purge_step=step or None)
        self._queue = queue
        self._waiting: list[
            tuple[int, dict[str, float]]
        ] = []  # the writer's own queue counts values, not steps

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._waiting.append((step, dict(values)))
        if len({waiting for waiting, _ in self._waiting}) >= self._queue:
            self.flush()

    def text(self, name: str, value: Any) -> None:
        """A text, for example the config; secrets in it are hidden."""
        self._writer.add_text(name, redact_log(str(value)))

    def flush(self) -> None:
        for step, values in self._waiting:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        self._waiting.clear()
        self._writer.flush()

    def close(self) -> None:
        self.flush()
        self._writer.close()
