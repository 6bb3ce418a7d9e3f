"""The process of a rank, as the ranks introduce themselves to each other."""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

MEMORY_FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class RankProcess:
    """A rank's process.

    Attributes:
        machine: equal for processes that see each other and share memory files.
        token: rank 0's is that of the job.
    """

    host: str
    pid: int
    machine: str = ""
    token: str = ""

    @staticmethod
    def of_this_one() -> RankProcess:
        host = socket.gethostname()
        return RankProcess(host, os.getpid(), _machine(), secrets.token_hex(8))

    def encode(self) -> str:
        return json.dumps(vars(self))

    @staticmethod
    def decode(text: bytes) -> RankProcess:
        return RankProcess(**json.loads(text))


def _machine() -> str:
    """Return what processes have in common that can watch each other; "" where none can."""
    # The host's name would not do: containers of one machine may share it.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        return f"{boot} {namespace} {memory_folder().stat().st_dev}"
    except OSError:
        return ""


def memory_folder() -> Path:
    """Return the folder of files in memory, else that of temporary files."""
    folder = MEMORY_FOLDER
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
