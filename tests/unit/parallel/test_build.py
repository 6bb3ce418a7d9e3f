"""The grid's arithmetic: which ranks form which axis."""

from __future__ import annotations

import itertools

import pytest

from evomesh.config.layout import axis_sizes
from evomesh.config.schema import ParallelConfig
from evomesh.errors import UserError
from evomesh.parallel import build
from evomesh.parallel.build import axis_members, build_grid
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import ShardSpec, optimizer_axes
from tests.support.covers import covers


def parallel(
    tensor: int = 1,
    mode: str = "mtp",
    pipeline: int = 1,
    weight: int = 1,
    zero1: int = -1,
) -> ParallelConfig:
    return ParallelConfig.model_validate(
        {
            "tensor": {"size": tensor, "mode": mode},
            "pipeline": {"size": pipeline},
            "weight": {"size": weight},
            "zero1": {"size": zero1},
        }
    )


def test_one_process_needs_no_process_group() -> None:
    assert build_grid(parallel(), 1, 0) == Grid()


def test_the_axes_of_a_16_rank_world() -> None:
    """InternEvo's order: tensor ranks are adjacent, stages are contiguous blocks, zero groups consecutive members."""
    sizes = axis_sizes(parallel(tensor=2, pipeline=2, zero1=2), 16)
    assert (sizes.pp, sizes.dp, sizes.tp, sizes.zero, sizes.replica) == (2, 4, 2, 2, 2)
    assert axis_members(sizes, 5) == {
        "pp": [5, 13],
        "dp": [1, 3, 5, 7],
        "tp": [4, 5],
        "wp": [5],
        "zero": [5, 7],
        "replica": [1, 5],
    }


def test_isp_cuts_weights_and_sequence_independently() -> None:
    sizes = axis_sizes(parallel(tensor=2, mode="isp", weight=4, zero1=2), 16)
    assert (sizes.dp, sizes.zero, sizes.replica) == (8, 2, 2)
    assert axis_members(sizes, 6) == {
        "pp": [6],
        "dp": [0, 2, 4, 6, 8, 10, 12, 14],
        "tp": [6, 7],
        "wp": [4, 5, 6, 7],
        "zero": [2, 6],
        "replica": [6, 14],
    }


@pytest.mark.parametrize("mode", ["mtp", "isp"])
@pytest.mark.parametrize(
    ("tensor", "weight", "pipeline", "zero1"),
    itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, -1)),
)
def test_every_axis_partitions_the_world(
    mode: str, tensor: int, weight: int, pipeline: int, zero1: int
) -> None:
    sizes = axis_sizes(
        parallel(tensor, mode, pipeline, weight if mode == "isp" else 1, zero1), 16
    )
    for name in ("pp", "dp", "tp", "wp", "zero", "replica"):
        groups = {tuple(axis_members(sizes, rank)[name]) for rank in range(16)}
        assert sorted(rank for group in groups for rank in group) == list(range(16))
        assert all(rank in axis_members(sizes, rank)[name] for rank in range(16))
    inner = "wp" if mode == "isp" else "tp"
    # One stage is the product of the three axes of the parameter view.
    for rank in range(16):
        reached = {rank}
        for name in (inner, "zero", "replica"):
            reached = {
                other for one in reached for other in axis_members(sizes, one)[name]
            }
        first = rank - rank % sizes.ranks_per_stage
        assert reached == set(range(first, first + sizes.ranks_per_stage))


@covers("parallel.zero1", "parallel.zero1.size")
@pytest.mark.parametrize(
    ("zero1", "size"), [(-1, 8), (0, 8), (-5, 8), (1, 1), (4, 4), (64, 8)]
)
def test_zero1_rules(zero1: int, size: int) -> None:
    assert axis_sizes(parallel(zero1=zero1), 8).zero == size


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"6 processes cannot be divided by pipeline.size \* tensor.size = 4",
    ):
        axis_sizes(parallel(tensor=4), 6)
    with pytest.raises(
        UserError, match=r"zero1.size = 3 does not divide the 8 data-parallel ranks"
    ):
        axis_sizes(parallel(zero1=3), 8)
    with pytest.raises(UserError, match=r"pipeline.size \* weight.size = 8"):
        axis_sizes(parallel(mode="isp", tensor=2, weight=8), 12)


def test_state_of_what_isp_cuts_on_tp_is_cut_over_the_data_axis() -> None:
    grid = Grid(tp=Axis("tp", 2), dp=Axis("dp", 2), zero=Axis("zero", 4), wp=Axis("wp"))
    assert optimizer_axes(ShardSpec((8, 4), (("tp", 0),)), grid)[0] == grid.dp
    assert optimizer_axes(ShardSpec((8, 4)), grid)[0] == grid.zero
    undivided = Grid(tp=Axis("tp", 2), dp=Axis("dp", 2), replica=Axis("replica", 4))
    assert optimizer_axes(ShardSpec((8, 4), (("tp", 0),)), undivided) == (
        Axis("zero"),
        undivided.dp,
        undivided.tp,
    )


@pytest.mark.parametrize(
    ("config", "of_world"),
    [
        ("cpu:gloo,cuda:nccl", "nccl"),
        ("cpu:gloo,cuda:gloo", None),
        ("cpu:fake,cuda:fake", None),
    ],
)
def test_only_the_data_axis_has_a_backend_for_the_host(
    monkeypatch: pytest.MonkeyPatch, config: str, of_world: str | None
) -> None:
    """A separate gloo for every group would cost sockets and threads that nothing uses."""
    made: dict[tuple[int, ...], str | None] = {}

    def new_group(members: list[int], backend: str | None = None, **_: object) -> str:
        made[tuple(members)] = backend
        return "group"

    monkeypatch.setattr("torch.distributed.new_group", new_group)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: config)
    build_grid(parallel(tensor=2, pipeline=2, zero1=2), 16, 5)
    assert made == {
        (5, 13): of_world,
        (1, 3, 5, 7): None,
        (4, 5): of_world,
        (5, 7): of_world,
        (1, 5): of_world,
    }
    made.clear()
    build_grid(parallel(), 4, 1)
    assert made == {(0, 1, 2, 3): None}, "the data axis, which zero shares"


@pytest.mark.parametrize(
    ("tensor", "pipeline", "weight", "mode"),
    [
        (1, 4, 1, "mtp"),
        (2, 4, 1, "msp"),
        (1, 8, 1, "mtp"),
        (2, 4, 4, "isp"),
        (4, 2, 1, "fsp"),
    ],
)
def test_all_ranks_make_the_same_number_of_groups(
    tensor: int, pipeline: int, weight: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch 2.15 numbers groups of all ranks by how many a rank has made."""
    made: list[tuple[int, ...]] = []

    def new_group(members: list[int], **options: object) -> object:
        made.append(tuple(members))
        return object()

    monkeypatch.setattr(build.dist, "new_group", new_group)
    monkeypatch.setattr(build, "device_backend", lambda: None)
    counts = []
    for rank in range(16):
        made.clear()
        build_grid(parallel(tensor, mode, pipeline, weight), 16, rank)
        assert all(rank in members for members in made)
        assert len(set(made)) == len(made)
        counts.append(len(made))
    assert len(set(counts)) == 1 and counts[0] >= 2
