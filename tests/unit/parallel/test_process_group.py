"""Which backends carry a job, by the GPUs that its ranks see."""

from __future__ import annotations

import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from evomesh.parallel import process_group
from evomesh.parallel.process_group import backend, gpu_identity, join_world
from evomesh.parallel.rendezvous import JobAddress
from tests.support.interpreter import free_port

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FIRST, SECOND = uuid.UUID(int=1), uuid.UUID(int=2)


def test_a_gpu_is_told_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid=FIRST)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu_identity(GPU) == str(FIRST)
    assert gpu_identity(CPU) == gpu_identity(CPU) != str(FIRST)


def test_backends() -> None:
    assert backend(CPU) == backend(CPU, is_shared=True) == "gloo"
    assert backend(GPU) == "cpu:gloo,cuda:nccl"
    assert backend(GPU, is_shared=True) == "gloo"


@pytest.mark.parametrize(
    ("gpus", "expected", "named"),
    [
        # torchrun --virtual-local-rank: each rank sees one GPU, as number 0.
        ([str(FIRST), str(SECOND)], "cpu:gloo,cuda:nccl", ""),
        # Slurm with two tasks on one GPU, without a variable that shows it.
        ([str(FIRST), str(FIRST)], "gloo", "ranks 0, 1 share one GPU"),
        ([str(FIRST), str(SECOND), str(SECOND)], "gloo", "ranks 1, 2 share one GPU"),
        (["none", "none"], "cpu:gloo,cuda:nccl", ""),
    ],
)
def test_all_ranks_choose_alike(
    gpus: list[str], expected: str, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks as threads meet at a real store; only the group itself is not made."""
    port, size = free_port(), len(gpus)
    groups: list[str] = []
    stores = []  # as a group does, so that rank 0's outlives the slower ranks
    devices = [SimpleNamespace(type="cuda", gpu=gpu) for gpu in gpus]

    def join(rank: int) -> None:
        address = JobAddress(rank, size, "127.0.0.1", port)
        join_world(devices[rank], address)  # type: ignore[arg-type]

    def make_group(name: str, **options: Any) -> None:
        groups.append(name)
        stores.append(options["store"])

    with (
        mock.patch.object(process_group, "gpu_identity", lambda device: device.gpu),
        mock.patch.object(process_group, "PeerWatch"),
        mock.patch.object(process_group.dist, "init_process_group", make_group),
        ThreadPoolExecutor(size) as threads,
        caplog.at_level(logging.WARNING, "evomesh"),
    ):
        list(threads.map(join, range(size)))
    assert groups == [expected] * size
    assert named in caplog.text
    assert bool(caplog.text) == bool(named)
