"""Memory of gradient buckets, and the streams that fill them, without a device: on meta, in a fake world."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from evomesh.config.schema import AdamConfig, ParallelConfig, ZeroConfig
from evomesh.optim import buckets
from evomesh.optim.buckets import GradientSync
from evomesh.optim.slot import make_slot
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.build import build_grid
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.process_group import fake_world

META = torch.device("meta")
WIDTH, LAYERS = 64, 16
BUCKET = 2 * WIDTH * WIDTH


def peak_of_step(zero1: int, dtype: torch.dtype, overlap: bool) -> int:
    """Return the most bytes of tensors in a step on one of eight data-parallel ranks."""
    parallel = ParallelConfig.model_validate({"zero1": {"size": zero1}})
    with fake_world(8, 3):
        grid = build_grid(parallel, 8, 3)
        linears = [
            nn.Linear(WIDTH, WIDTH, bias=False, device=META, dtype=dtype)
            for _ in range(LAYERS)
        ]
        model = nn.Sequential(*linears)
        zero = ZeroConfig(
            overlap_sync_grad=overlap, reduce_bucket_size=BUCKET, clip_grad_norm=0.0
        )
        optimizer = ZeroOptimizer(
            model.named_parameters(), AdamConfig(), zero, grid, model
        )
        tracker = MemTracker()
        accumulated = [
            slot.accumulated_grad
            for slot in optimizer.slots
            if slot.accumulated_grad is not None
        ]
        tracker.track_external(model, *optimizer.state_tensors().values(), *accumulated)
        with tracker:
            optimizer.expect_micro_batches(1)
            model(torch.ones(1, WIDTH, device=META, dtype=dtype)).sum().backward()
            optimizer.communicate_only()
        return int(tracker.get_tracker_snapshot("peak")[META]["Total"])


@pytest.mark.filterwarnings("ignore:Expected a tensor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("zero1", [8, 2, 1])
def test_overlap_needs_no_more_memory_than_one_bucket(
    zero1: int, dtype: torch.dtype
) -> None:
    plain, overlapped = (
        peak_of_step(zero1, dtype, overlap) for overlap in (False, True)
    )
    bound = BUCKET * 4
    if dtype == torch.float32 and zero1 > 1:
        # Without overlap, gradients are freed before the next sum arrives; with it, all sums wait for the end.
        bound += LAYERS * WIDTH * WIDTH * 4 // zero1
    assert overlapped - plain <= bound


def sync_of(sharded: tuple[bool, ...], bucket_size: int = 10**9) -> GradientSync:
    grid = Grid(dp=Axis("dp", 2), replica=Axis("replica", 2))
    slots = []
    for index, is_sharded in enumerate(sharded):
        parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        if is_sharded:
            parameter.to_local = lambda parameter=parameter: parameter.data  # type: ignore[attr-defined]
        slots.append(make_slot(f"p{index}", parameter, grid))
    return GradientSync(slots, bucket_size, overlap=True)


def test_sharded_and_whole_parameters_share_no_bucket() -> None:
    """FSDP2 calls hooks on its own stream: a bucket filled on two streams could be sent half done."""
    sync = sync_of((False, True, True, False))
    names = [[slot.name for slot in bucket.slots] for bucket in sync.buckets]
    assert names == [["p2", "p1"], ["p3", "p0"]]


def test_a_launch_waits_for_the_streams_of_all_its_slots() -> None:
    """A full bucket is launched by the hook of a later one too, on whatever stream that runs."""
    sync = sync_of((True, False), bucket_size=1)
    events: list[Any] = []

    def record_event(device: torch.device) -> Any:
        number = len([event for event in events if event[0] == "record"])
        events.append(("record", number))
        return SimpleNamespace(wait=lambda: events.append(("wait", number)))

    def launch_all_reduce(bucket: Tensor, axis: Axis) -> Any:
        events.append(("launch",))
        return SimpleNamespace(wait=lambda: bucket)

    with mock.patch.multiple(
        buckets, record_event=record_event, launch_all_reduce=launch_all_reduce
    ):
        sync.expect_micro_batches(1)
        first, second = (bucket.slots[0] for bucket in sync.buckets)
        # Out of order: the first hook launches nothing, the second both.
        for slot in (second, first):
            slot.backwards = 1
            sync.mark_ready(slot)
    assert events == [
        ("record", 0),
        ("record", 1),
        ("wait", 1),
        ("launch",),
        ("wait", 0),
        ("launch",),
    ]
