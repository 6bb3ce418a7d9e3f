"""Every collective against what it means on whole tensors, and its backward against its dual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evomesh.parallel import collectives as c
from evomesh.parallel.grid import Axis
from evomesh.parallel.traffic import record_traffic
from tests.support.pool import Pool, grid_of

SHAPE = (8, 12, 4)


def seeded(rank: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)
    )


def forward_and_backward(
    rank: int, ranks: int, name: str, dims: tuple[int, ...], shape: tuple[int, ...]
) -> object:
    """This rank's output, its gradient for a seeded output gradient, and whether the input stayed as it was."""
    axis = grid_of(tensor=ranks).tp
    function: Callable[..., Tensor] = getattr(c, name)
    x = seeded(rank, shape).requires_grad_()
    y = function(x, axis, *dims)
    grad = seeded(100 + rank, tuple(y.shape))
    y.backward(grad)
    kept = torch.equal(x.detach(), seeded(rank, shape)) and torch.equal(
        grad, seeded(100 + rank, tuple(y.shape))
    )
    return y.detach(), x.grad, kept


def expected(name: str, tensors: list[Tensor], dims: tuple[int, ...]) -> list[Tensor]:
    """The same move, on the list of all ranks' tensors."""
    size = len(tensors)
    if name in ("all_gather", "gather_from_axis"):
        return [torch.cat(tensors, dims[0])] * size
    if name == "reduce_scatter":
        return list(torch.stack(tensors).sum(0).chunk(size, dims[0]))
    if name == "all_reduce":
        return [torch.stack(tensors).sum(0)] * size
    if name == "copy_to_axis":
        return tensors
    if name == "shard_to_axis":
        return [t.chunk(size, dims[0])[rank] for rank, t in enumerate(tensors)]
    parts = [t.chunk(size, dims[0]) for t in tensors]
    return [
        torch.cat([parts[sender][rank] for sender in range(size)], dims[1])
        for rank in range(size)
    ]


# forward -> backward; all_reduce and copy_to_axis need no communication in one direction
DUALS = {
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "all_reduce": "copy_to_axis",
    "copy_to_axis": "all_reduce",
    "gather_from_axis": "shard_to_axis",
    "shard_to_axis": "gather_from_axis",
    "all_to_all": "all_to_all",
}
CASES = [
    (name, (dim,))
    for name in ("all_gather", "reduce_scatter", "gather_from_axis", "shard_to_axis")
    for dim in (0, 1)
]
CASES += [
    ("all_reduce", ()),
    ("copy_to_axis", ()),
    ("all_to_all", (0, 1)),
    ("all_to_all", (1, 0)),
    ("all_to_all", (2, 0)),
]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("name", "dims"), CASES, ids=lambda case: str(case).replace(" ", "")
)
def test_forward_is_the_move_and_backward_its_dual(
    pool: Pool, name: str, dims: tuple[int, ...], ranks: int
) -> None:
    results = pool.run(forward_and_backward, ranks, name, dims, SHAPE, ranks=ranks)
    outputs = expected(name, [seeded(rank) for rank in range(ranks)], dims)
    grads = [
        seeded(100 + rank, tuple(output.shape)) for rank, output in enumerate(outputs)
    ]
    back = expected(DUALS[name], grads, tuple(reversed(dims)))
    for rank, (y, grad, kept) in enumerate(results):
        torch.testing.assert_close(y, outputs[rank], rtol=0, atol=1e-14)
        torch.testing.assert_close(grad, back[rank], rtol=0, atol=1e-14)
        assert kept, "a collective wrote to its input"


@pytest.mark.parametrize(
    ("name", "dims"), CASES, ids=lambda case: str(case).replace(" ", "")
)
def test_axis_of_one_rank_is_the_identity(name: str, dims: tuple[int, ...]) -> None:
    x = seeded(0)
    assert getattr(c, name)(x, Axis("tp"), *dims) is x


def buckets(rank: int) -> object:
    axis = grid_of(tensor=4).tp
    bucket = seeded(rank, (4, 6))
    scattered = c.launch_reduce_scatter(bucket, axis)
    total = c.launch_all_reduce(bucket, axis)
    gathered = c.launch_all_gather(scattered.wait(), axis)
    return (
        scattered.wait(),
        gathered.wait(),
        total.wait(),
        torch.equal(bucket, seeded(rank, (4, 6))),
    )


def test_buckets_in_flight(pool: Pool) -> None:
    total = torch.stack([seeded(rank, (4, 6)) for rank in range(4)]).sum(0)
    for rank, (row, gathered, reduced, kept) in enumerate(pool.run(buckets)):
        torch.testing.assert_close(row, total[rank], rtol=0, atol=1e-14)
        torch.testing.assert_close(gathered, total, rtol=0, atol=1e-14)
        torch.testing.assert_close(reduced, total, rtol=0, atol=1e-14)
        assert kept


def counted(rank: int) -> object:
    grid = grid_of(tensor=2, pipeline=2)
    x = torch.zeros(4, 8).requires_grad_()
    with record_traffic(grid) as traffic:
        c.reduce_scatter(c.all_gather(x, grid.tp), grid.tp).sum().backward()
        c.all_reduce_no_grad(torch.zeros(3, dtype=torch.float64), grid.pp)
    return traffic.count(), traffic.nbytes()


def test_traffic_counter_sees_forward_and_backward_by_axis(pool: Pool) -> None:
    whole = 2 * 4 * 8 * 4
    for count, nbytes in pool.run(counted):
        assert count == {
            ("all_gather", "tp"): 2,
            ("reduce_scatter", "tp"): 2,
            ("all_reduce", "pp"): 1,
        }
        assert nbytes == {
            ("all_gather", "tp"): 2 * whole,
            ("reduce_scatter", "tp"): 2 * whole,
            ("all_reduce", "pp"): 24,
        }


def all_reduce_returns_what_nothing_wrote_into(rank: int) -> bool:
    written: list[int] = []
    reduce = c.dist.all_reduce

    def record(tensor: Tensor, *arguments: object, **options: object) -> object:
        written.append(tensor.data_ptr())
        return reduce(tensor, *arguments, **options)

    c.dist.all_reduce = record
    try:
        output = c.all_reduce(seeded(rank).requires_grad_(), grid_of(tensor=2).tp)
    finally:
        c.dist.all_reduce = reduce
    return len(written) == 1 and output.data_ptr() not in written


def test_all_reduce_returns_a_tensor_that_nothing_wrote_into(pool: Pool) -> None:
    """The compiler of torch 2.11 makes wrong gradients otherwise (pytorch issue 180642)."""
    assert all(pool.run(all_reduce_returns_what_nothing_wrote_into, ranks=2))
