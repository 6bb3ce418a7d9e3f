"""The process groups of a run, alone in its world: NCCL for tensors on the device, gloo for those on the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evomesh.parallel import collectives
from evomesh.parallel.process_group import backend


@pytest.fixture
def group(device: torch.device, tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group as ``build_grid`` makes it."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend(device), store=store, rank=0, world_size=1)
    yield dist.new_group([0], use_local_synchronization=True)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_buckets_of_an_optimizer_go_round(
    device: torch.device, group: dist.ProcessGroup, dtype: torch.dtype
) -> None:
    """The very functions of torch that the collectives call; an axis of one rank would call none."""
    x = torch.arange(8, device=device).to(dtype)
    total = x.clone()
    dist.all_reduce(total, group=group, async_op=True).wait()
    own, whole = torch.empty_like(x), torch.empty_like(x)
    collectives.reduce_scatter_single(own, x, group=group)
    collectives.gather_single(whole, x, group=group)
    arrived = torch.empty_like(x)
    dist.all_to_all_single(arrived, x, group=group)
    for found in (total, own, whole, arrived):
        assert torch.equal(found, x)


def test_counts_on_the_host_need_no_device(
    device: torch.device, group: dist.ProcessGroup
) -> None:
    count = torch.tensor(7)
    dist.all_reduce(count, group=group)
    assert int(count) == 7 and count.device.type == "cpu"


def test_objects_are_gathered(device: torch.device, group: dist.ProcessGroup) -> None:
    values = [None]
    dist.all_gather_object(values, {"step": 3}, group=group)
    assert values == [{"step": 3}]
