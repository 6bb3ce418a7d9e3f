"""The default process group: join it, leave it, or fake it for traces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def join_world(device: torch.device, *, rank: int, world_size: int, host: str, port: int) -> None:
    """Create the default process group; a world of one process needs none.

    Args:
        host: address that all ranks connect to; ignored in a process started by torchrun, whose agent provides it.
    """
    if world_size == 1:
        return
    started_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    address = f"[{host}]" if ":" in host else host  # IPv6
    dist.init_process_group(
        backend(device),
        init_method="env://" if started_by_torchrun else f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
    )


def leave_world() -> None:
    """Destroy the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def backend(device: torch.device) -> str:
    """Return the backends: NCCL for CUDA tensors and gloo for CPU tensors, or gloo for both on a shared device."""
    if device.type != "cuda":
        return "gloo"
    several_ranks_per_device = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
    return "gloo" if several_ranks_per_device else "cpu:gloo,cuda:nccl"


def first_ranks_number(number: float) -> float:
    """Return rank 0's ``number`` on every rank of the world."""
    if not dist.is_initialized():
        return number
    numbers = [number]
    dist.broadcast_object_list(numbers, src=0)
    return numbers[0]


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Create a default process group in which every collective returns at once and moves nothing."""
    # torch has no public name for this; its own memory and trace tools import it too.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a process that is in a process group cannot trace another world")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
