"""The step that a supervised run is at, in a small file, so that its end can be dated after a kill -9."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evomesh.monitor.optional_output import OptionalOutput
from evomesh.train.signals import SUPERVISOR

VARIABLE = "EVOMESH_STEP_FILE"  # set by the supervisor
_DIGITS = 20  # one call of fixed length replaces a step


@dataclass(frozen=True)
class RunPosition:
    """Last known position of a run; None where it had none yet."""

    step: int | None = None
    run_folder: Path | None = None


class StepFile:
    """The writer: one line with the step, one with the run folder."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._output = OptionalOutput("the supervisor's step file", tries_again=True)

    @staticmethod
    def of_this_process(env: Mapping[str, str] = os.environ) -> StepFile | None:
        """Return the file that a supervisor has asked for, of the first rank that it started; None for others."""
        path = env.get(VARIABLE)
        # Under torchrun each rank may have a supervisor, which is its parent.
        is_alone = env.get(SUPERVISOR) == str(os.getppid())
        is_first = is_alone or env.get("LOCAL_RANK", "0") == "0"
        return StepFile(path) if path and is_first else None

    def write(self, step: int, run_folder: Path) -> None:
        """Record that ``step`` begins; a failure is logged once, and ends no run."""
        line = f"{step:<{_DIGITS}}\n{run_folder.absolute()}\n"
        self._output.attempt(lambda: self._put(line.encode()))

    def _put(self, line: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, line, 0)
        finally:
            os.close(descriptor)


def read_position(path: Path) -> RunPosition:
    """Return what the file holds."""
    try:
        step, _, folder = path.read_text().partition("\n")
        return RunPosition(int(step), Path(folder.strip()))
    except (OSError, ValueError):
        return RunPosition()
