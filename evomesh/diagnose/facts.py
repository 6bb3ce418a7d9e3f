"""Facts that a rank states about its machine, as JSON: versions, device, limits."""

from __future__ import annotations

import os
import platform
import resource
import socket
from dataclasses import asdict, dataclass
from typing import Any

import torch

import evomesh
from evomesh.diagnose.results import RankPlace
from evomesh.parallel.process_group import gpu_identity
from evomesh.train.agreement import source_digest

SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Limits:
    """Limits of this process, read before it joins the others, which raises one of them.

    Attributes:
        open_files: the most that the process may allow itself; None without a limit, as of the others.
        processes: of this user, threads included.
        locked_memory: bytes.
        shared_memory: size of /dev/shm in bytes; None where there is none.
    """

    open_files: int | None
    processes: int | None
    locked_memory: int | None
    shared_memory: int | None


@dataclass(frozen=True)
class MachineFacts:
    """Statements of one rank about itself.

    Attributes:
        versions: by name of the program.
        device: its name, such as ``cuda:0 NVIDIA H100`` or ``cpu``.
        gpu: identity of the GPU, the same for all ranks that share it.
    """

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    gpu: str
    cores: int
    limits: Limits

    @property
    def place(self) -> RankPlace:
        return RankPlace(self.rank, self.host)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def as_message(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return asdict(self)

    @staticmethod
    def of_message(message: dict[str, Any]) -> MachineFacts:
        """Return the facts that ``as_message`` gave."""
        limits = Limits(**message["limits"])
        return MachineFacts(**{**message, "limits": limits})


def read_limits() -> Limits:
    """Return the limits of this process."""
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Limits(
        open_files=_finite(open_files),
        processes=_finite(processes),
        locked_memory=_finite(locked),
        shared_memory=_size_of(SHARED_MEMORY),
    )


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _size_of(folder: str) -> int | None:
    try:
        system = os.statvfs(folder)
    except OSError:
        return None
    return system.f_blocks * system.f_frsize


def read_facts(rank: int, device: torch.device, limits: Limits) -> MachineFacts:
    """Return the facts of this process."""
    return MachineFacts(
        rank=rank,
        host=socket.gethostname(),
        versions=_versions(),
        device=_describe(device),
        gpu=gpu_identity(device),
        cores=len(os.sched_getaffinity(0)),
        limits=limits,
    )


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "evomesh": evomesh.__version__,
        "evomesh's code": source_digest(),
        "CUDA": torch.version.cuda or "none",
    }
    if torch.cuda.is_available():
        numbers = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        versions["NCCL"] = ".".join(map(str, numbers))
    return versions


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} {torch.cuda.get_device_name(device)}"
