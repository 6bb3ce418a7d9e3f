"""The stand-in for NCCL: each of its rules, broken where gloo forgives it, is named with both ranks' stacks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from evomesh.parallel.modes import MODES
from evomesh.train.stages import build_stages
from tests.dist.layouts import Layout, packs
from tests.support.nccl_log import HostTensor
from tests.support.pool import Pool, RankError, grid_of

PAIR = [0, 1]


@functools.cache
def group_of(*ranks: int, backend: str = "nccl") -> Any:
    return dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)


def sum_of(numel: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    options.setdefault("group", group_of(*PAIR))
    return dist.all_reduce(torch.ones(numel, dtype=dtype), **options)


def send(to: int, numel: int = 2) -> Any:
    return dist.isend(torch.ones(numel), group=group_of(*PAIR), group_dst=to)


def receive(source: int, numel: int = 2) -> None:
    dist.recv(torch.ones(numel), group=group_of(*PAIR), group_src=source)


def batch(*operations: Any, peer: int, group: Any = None) -> list[Any]:
    group = group or group_of(*PAIR)
    operations_of_batch = [
        dist.P2POp(operation, torch.ones(2), group=group, group_peer=peer)
        for operation in operations
    ]
    return dist.batch_isend_irecv(operations_of_batch)


def other_reduction(rank: int) -> None:
    operation = dist.ReduceOp.MAX if rank == 0 else dist.ReduceOp.SUM
    sum_of(op=operation)


def other_shape(rank: int) -> None:
    sum_of(numel=2 + rank)


def other_dtype(rank: int) -> None:
    sum_of(dtype=(torch.float32, torch.int32)[rank])


def other_kind(rank: int) -> None:
    group = group_of(*PAIR)
    if rank == 0:
        dist.all_reduce(torch.ones(2), group=group)
    else:
        dist.broadcast(torch.ones(2), group=group, group_src=0)


def other_root(rank: int) -> None:
    dist.broadcast(torch.ones(2), group=group_of(*PAIR), group_src=rank)


def other_order(rank: int) -> None:
    """Wait for two communicators in opposite orders."""
    groups = [group_of(*PAIR), group_of(*PAIR, backend="gloo")]
    for group in groups if rank == 0 else reversed(groups):
        sum_of(group=group)


def both_send_first(rank: int) -> None:
    work = send(1 - rank)
    receive(1 - rank)
    work.wait()


def message_of_other_length(rank: int) -> None:
    if rank == 0:
        send(1, numel=2).wait()
    else:
        receive(0, numel=3)


def sends_overtake(rank: int) -> None:
    """Receive first what the other rank sends second, by tags, which NCCL does not have."""
    tags = (0, 1) if rank == 0 else (1, 0)
    lengths = (2, 3) if rank == 0 else (3, 2)
    for tag, length in zip(tags, lengths, strict=True):
        x, group = torch.ones(length), group_of(*PAIR)
        if rank == 0:
            dist.isend(x, group=group, group_dst=1, tag=tag)
        else:
            dist.recv(x, group=group, group_src=0, tag=tag)


def batch_meets_single(rank: int) -> None:
    if rank == 0:
        works = batch(dist.isend, dist.irecv, peer=1)
    else:
        works = [send(0)]
        receive(0)
    for work in works:
        work.wait()


def batch_and_collective_swapped(rank: int) -> None:
    """Launch both at once, so that gloo does not care which is first."""
    sum_of()
    if rank == 0:
        works = [*batch(dist.isend, dist.irecv, peer=1), sum_of(async_op=True)]
    else:
        works = [sum_of(async_op=True), *batch(dist.isend, dist.irecv, peer=0)]
    for work in works:
        work.wait()


def batch_of_some_comes_first(rank: int) -> None:
    """Two of three ranks use a communicator which all three have to make."""
    group = group_of(0, 1, 2)
    if rank < 2:
        for work in batch(dist.isend, dist.irecv, peer=1 - rank, group=group):
            work.wait()


def one_never_joins(rank: int) -> None:
    if rank == 0:
        sum_of(async_op=True)


def groups_made_in_other_order(rank: int) -> None:
    backends = ["nccl", "gloo"]
    for backend in backends if rank == 0 else reversed(backends):
        dist.new_group(PAIR, backend=backend, use_local_synchronization=True)


SAME = "not the same collective"
STUCK = "no rank can continue"
BROKEN = [
    (other_reduction, SAME),
    (other_shape, SAME),
    (other_dtype, SAME),
    (other_kind, SAME),
    (other_root, SAME),
    (other_order, STUCK),
    (both_send_first, "both ends of a pair do the same"),
    (message_of_other_length, "a send and its receive differ"),
    (sends_overtake, "a send and its receive differ"),
    (batch_meets_single, STUCK),
    (batch_and_collective_swapped, STUCK),
    (one_never_joins, STUCK),
    (groups_made_in_other_order, SAME),
]


@pytest.mark.parametrize(
    ("program", "rule"), BROKEN, ids=[program.__name__ for program, _ in BROKEN]
)
def test_a_broken_rule_is_named_with_both_stacks(
    pool: Pool, program: Callable[[int], None], rule: str
) -> None:
    with pytest.raises(RankError, match=rule) as refused:
        pool.run(program, ranks=2)
    verdict = str(refused.value).split("---")[0]
    for rank in PAIR:
        assert f"rank {rank} " in verdict
    if program is not one_never_joins:
        assert verdict.count(f"in {program.__name__}\n") >= 2


def sum_of_many(rank: int) -> float:
    x = torch.full((4096,), rank + 1.0)
    dist.all_reduce(x, group=group_of(*PAIR))
    return float(x.sum())


def test_the_next_job_meets_nothing_of_one_that_broke_a_rule(pool: Pool) -> None:
    """A sum that the other rank never joins would be met by that rank's next one."""
    pool.run(sum_of_many, ranks=2)  # the group exists
    with pytest.raises(RankError, match=STUCK):
        pool.run(one_never_joins, ranks=2)
    assert pool.run(sum_of_many, ranks=2) == [4096 * 3.0] * 2


def test_a_communicator_is_made_by_all_its_ranks(pool: Pool) -> None:
    with pytest.raises(RankError, match=STUCK) as refused:
        pool.run(batch_of_some_comes_first, ranks=3)
    assert str(refused.value).count("in batch_of_some_comes_first\n") >= 2


def host_tensor_to_device_group(rank: int) -> None:
    host = torch.ones(2).as_subclass(HostTensor)
    dist.all_reduce(host, group=group_of(*PAIR, backend="gloo"))
    dist.all_reduce(host, group=group_of(*PAIR))


def test_a_host_tensor_stays_out_of_groups_of_the_device(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"HostTensorError: a host tensor \(2,\)"):
        pool.run(host_tensor_to_device_group, ranks=2)


def allowed(rank: int) -> str:
    """Use every freedom that NCCL leaves."""
    # Streams of two communicators are independent while nobody waits.
    groups = [group_of(*PAIR), group_of(*PAIR, backend="gloo")]
    for group in groups:
        sum_of(group=group)
    works = [
        sum_of(group=group, async_op=True)
        for group in (groups if rank == 0 else groups[::-1])
    ]
    # A batch sends and receives on both sides at once, in any order of its parts.
    parts = (dist.isend, dist.irecv) if rank == 0 else (dist.irecv, dist.isend)
    works += batch(*parts, peer=1 - rank)
    # Only the root of these two has the tensors of all.
    group, x = group_of(*PAIR), torch.ones(2)
    parts_of_root = [torch.ones(2), torch.ones(2)] if rank == 0 else None
    dist.gather(x, parts_of_root, group=group, group_dst=0)
    dist.scatter(x, parts_of_root, group=group, group_src=0)
    # Single messages, where one rank sends and the other receives.
    if rank == 0:
        works.append(send(1))
        receive(1)
    else:
        receive(0)
        works.append(send(0))
    for work in works:
        work.wait()
    return "done"


def test_what_nccl_allows_is_not_refused(pool: Pool) -> None:
    assert pool.run(allowed, ranks=2) == ["done"] * 2


def evaluate(rank: int, layout: Layout) -> list[int]:
    """Return the micro-batches whose losses this rank saw."""
    grid = grid_of(pipeline=layout.pipeline)
    stages = build_stages(layout.config, grid, MODES["mtp"], torch.device("cpu"))
    stages.initialize(1, grid)
    seen: list[int] = []
    batch = packs(0, range(layout.packs))
    stages.schedule.evaluate(batch, lambda index, output: seen.append(index))
    return seen


SMALL = {"num_layers": 8}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=4),
        Layout(pipeline=2, ranks=2, chunks=2),
        Layout(pipeline=4, chunks=2, model=SMALL),
        Layout(pipeline=2, ranks=2, chunks=2, schedule="zbv"),
        Layout(pipeline=4, chunks=2, schedule="zbv", model=SMALL),
    ],
    ids=str,
)
def test_pipelines_evaluate_under_the_rules(pool: Pool, layout: Layout) -> None:
    """Ranks with several stages both start with a send easily, which hangs NCCL and not gloo."""
    found = pool.run(evaluate, layout, ranks=layout.ranks)
    assert sorted(found)[-1] == list(range(layout.packs))
