"""State of another process as Linux has it: whether it runs, waits or is stopped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

STOPPED = "T"
TRACED = "t"
DISK_WAIT = "D"
ENDED = ("Z", "X")


@dataclass(frozen=True)
class ProcessState:
    """A process at one moment.

    Attributes:
        state: Linux's letter; "" for a process that has ended.
        cpu_s: seconds of processor time that all its threads have used.
    """

    state: str
    cpu_s: float = 0.0

    @property
    def has_ended(self) -> bool:
        return not self.state or self.state in ENDED

    @property
    def is_stopped(self) -> bool:
        return self.state in (STOPPED, TRACED)


def read_state(pid: int, started: int) -> ProcessState:
    """Return the state of the process that had this number at that start time."""
    try:
        fields = _fields(pid)
    except OSError:
        return ProcessState("")
    if started and int(fields[19]) != started:
        return ProcessState("")  # the number has been used again
    ticks = int(fields[11]) + int(fields[12])
    seconds = ticks / os.sysconf("SC_CLK_TCK")
    return ProcessState(fields[0], seconds)


def start_time(pid: int) -> int:
    """Return when a process started, in ticks since the boot.

    Raises:
        OSError: there is no such process.
    """
    return int(_fields(pid)[19])


def _fields(pid: int) -> list[str]:
    """Return what Linux says about a process, from its state on."""
    # The program's name, in parentheses, may hold anything.
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()
