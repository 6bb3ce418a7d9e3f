"""Tell one process from every other, on this machine and elsewhere."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

# States of a process that ended and that its parent has not collected yet.
ENDED = ("Z", "X")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process.

    Attributes:
        machine: boot of the kernel and its namespace of process ids; a random word where Linux's /proc is missing.
        pid: number of the process.
        started: start time in ticks of that boot, since a number is used again.
    """

    machine: str
    pid: int
    started: int

    @staticmethod
    def of_this_process() -> ProcessIdentity:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
            return ProcessIdentity(
                f"{boot} {namespace}", os.getpid(), _start_time(os.getpid())
            )
        except (OSError, ValueError, IndexError):
            return ProcessIdentity(secrets.token_hex(8), os.getpid(), 0)

    def has_ended(self, here: ProcessIdentity) -> bool:
        """Return whether the process is certain to be gone, which only a process of the same machine can tell."""
        if self.machine != here.machine:
            return False
        try:
            return _start_time(self.pid) != self.started
        except (ProcessLookupError, FileNotFoundError):
            return True
        except (OSError, ValueError, IndexError):
            return False


def _start_time(pid: int) -> int:
    """Return when a living process started, in ticks since the boot.

    Raises:
        ProcessLookupError: it has ended.
        OSError, ValueError, IndexError: /proc does not tell.
    """
    # The name of the program, in parentheses, may hold anything; the fields after it
    # may not.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in ENDED:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[19])
