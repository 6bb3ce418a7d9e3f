"""Tell one process from every other, on this machine and elsewhere."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# States of a process that ended and that its parent has not collected yet.
ENDED = ("Z", "X")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process.

    Attributes:
        machine: boot of the kernel and its namespace of process ids; a random word where
            Linux's /proc is missing.
        pid: number of the process.
        started: start time in ticks of that boot, since a number is used again.
    """

    machine: str
    pid: int
    started: int

    @staticmethod
    def of_this_process() -> ProcessIdentity:
        # The host's name would not do: containers of one machine may share it, and each
        # counts its processes from 1.
        pid = os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()
            namespace = os.readlink("/proc/self/ns/pid")
            machine = f"{boot.strip()} {namespace}"
            return ProcessIdentity(machine, pid, _start_time(pid))
        except (OSError, ValueError, IndexError):
            return ProcessIdentity(secrets.token_hex(8), pid, 0)

    @staticmethod
    def from_json(value: dict[str, Any]) -> ProcessIdentity:
        """Take back what ``dataclasses.asdict`` made of an identity.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        machine = str(value["machine"])
        return ProcessIdentity(machine, int(value["pid"]), int(value["started"]))

    def has_ended(self, here: ProcessIdentity) -> bool:
        """Return whether the process is certain to be gone.

        Only a process of the same machine can tell.
        """
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
    stat = Path(f"/proc/{pid}/stat").read_text()
    _, _, after_name = stat.rpartition(")")
    fields = after_name.split()
    if fields[0] in ENDED:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[19])
