"""ZeroOptimizer on 4 ranks, in every view of the grid, against ``torch.optim.AdamW`` on the whole tensors."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.optim.zero import StepResult, ZeroOptimizer
from evomesh.parallel.collectives import all_gather_objects
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import ShardSpec, with_spec
from tests.support.covers import covers
from tests.support.pool import Pool, grid_of
from tests.support.tolerances import LAYOUT, assert_close

# Large, since Adam's division amplifies the order of sums.
ADAM = AdamConfig(weight_decay=0.1, adam_eps=1e-2)
TP = {
    "embedding.weight": ShardSpec((16, 6), (("tp", 0),)),
    "layers.0.wo.weight": ShardSpec((8, 12), (("tp", 1),)),
    # As in sequence-parallel modes.
    "layers.0.norm.weight": ShardSpec((6,), (), frozenset({"tp"})),
    "layers.0.odd.weight": ShardSpec((6, 5)),  # rows divide by 2, not by 4
    "layers.0.bias": ShardSpec((8,), (("tp", 0),)),
    "gate.weight": ShardSpec((4, 4)),
}
ISP = TP | {
    "layers.0.wo.weight": ShardSpec((8, 12), (("wp", 0),)),
    "layers.0.odd.weight": ShardSpec((6, 5)),
    "layers.0.norm.weight": ShardSpec((8,), (("wp", 0),)),
    "layers.0.bias": ShardSpec((8,), (("wp", 0),)),
    "norm.weight": ShardSpec((6,), (), frozenset({"tp"})),
    "gate.weight": ShardSpec((4, 4), (), frozenset({"tp"})),
}
LAYOUTS: list[dict[str, Any]] = [
    *({"zero1": zero} for zero in (1, 2, 4)),
    *({"tensor": 2, "zero1": zero} for zero in (1, 2)),
    {"tensor": 4},
    {"pipeline": 2, "zero1": 2},
    *({"mode": "isp", "weight": weight, "tensor": tensor, "zero1": zero} for weight, tensor, zero in [
        (1, 2, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 2), (2, 2, 1), (2, 4, 2), (4, 1, 1), (4, 2, 1)
    ]),
]  # fmt: skip


def specs_of(layout: dict[str, Any]) -> dict[str, ShardSpec]:
    return ISP if layout.get("mode") == "isp" else TP


def data_axes(spec: ShardSpec, grid: Grid, isp: bool) -> tuple[Axis, ...]:
    """Independent of the optimizer: the axes on which ranks hold different summands of a parameter's gradient.

    Weight sharding has summed over wp what it cuts; what it leaves whole saw the data of every data rank.
    """
    cut_by = {name for name, _ in spec.shards}
    unshared = isp and grid.wp.size == 1 and "tp" not in cut_by | spec.partial
    if "wp" in cut_by or unshared:
        return (grid.replica, grid.zero)
    return (grid.dp, *([grid.tp] if "tp" in spec.partial else []))


def initial(name: str, spec: ShardSpec, dtype: torch.dtype) -> Tensor:
    return torch.randn(
        spec.shape,
        generator=torch.Generator().manual_seed(len(name)),
        dtype=torch.float64,
    ).to(dtype)


def summand(name: str, spec: ShardSpec, step: int, place: tuple[int, ...]) -> Tensor:
    seed = (
        step * 1000
        + sum(4**i * rank for i, rank in enumerate(place))
        + len(name) * 100_000
    )
    return torch.randn(
        spec.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def part(whole: Tensor, shards: tuple[tuple[str, int], ...], grid: Grid) -> Tensor:
    for name, dim in shards:
        axis = getattr(grid, name)
        whole = whole.chunk(axis.size, dim)[axis.rank]
    return whole.clone()


def build(
    layout: dict[str, Any], dtype: torch.dtype, **zero: Any
) -> tuple[dict[str, nn.Parameter], ZeroOptimizer]:
    grid = grid_of(**layout)
    parameters = {
        name: with_spec(
            nn.Parameter(part(initial(name, spec, dtype), spec.shards, grid)), spec
        )
        for name, spec in specs_of(layout).items()
    }
    return parameters, ZeroOptimizer(parameters.items(), ADAM, ZeroConfig(**zero), grid)


def give_gradients(
    parameters: dict[str, nn.Parameter], layout: dict[str, Any], step: int
) -> None:
    """Through backward, so that hooks run as in training."""
    grid = grid_of(**layout)
    for name, parameter in parameters.items():
        spec = parameter.spec  # type: ignore[attr-defined]
        place = tuple(
            axis.rank for axis in data_axes(spec, grid, layout.get("mode") == "isp")
        )
        gradient = part(summand(name, spec, step, place), spec.shards, grid).to(
            parameter.dtype
        )
        (parameter * gradient).sum().backward()  # type: ignore[no-untyped-call]


def train(
    layout: dict[str, Any], dtype: torch.dtype, steps: range, **zero: Any
) -> tuple[Any, ...]:
    parameters, optimizer = build(layout, dtype, **zero)
    results = []
    for step in steps:
        give_gradients(parameters, layout, step)
        results.append(optimizer.step(0.1 / (step + 1), 0.9, 1.0))
        optimizer.zero_grad()
    return parameters, optimizer, results


def reference(
    layout: dict[str, Any], grid: Grid, steps: range, clip: float
) -> tuple[dict[str, Tensor], list[float], Any]:
    specs = specs_of(layout)
    whole = {
        name: nn.Parameter(initial(name, spec, torch.float64))
        for name, spec in specs.items()
    }
    adamw = torch.optim.AdamW(
        whole.values(),
        weight_decay=ADAM.weight_decay,
        eps=ADAM.adam_eps,
        foreach=False,
        fused=False,
    )
    norms = []
    for step in steps:
        for name, spec in specs.items():
            axes = data_axes(spec, grid, layout.get("mode") == "isp")
            places = product(*(range(axis.size) for axis in axes))
            whole[name].grad = torch.stack(
                [summand(name, spec, step, place) for place in places]
            ).sum(0)
        # every stage of a pipeline has these parameters here, so the norm over the stages is that of pp copies
        norm = math.sqrt(grid.pp.size) * float(
            nn.utils.get_total_norm(
                [p.grad for p in whole.values() if p.grad is not None]
            )
        )
        for parameter in whole.values():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, clip / (norm + 1e-6))
        norms.append(norm)
        for group in adamw.param_groups:
            group["lr"], group["betas"] = 0.1 / (step + 1), (0.9, 0.9)
        adamw.step()
    return {name: p.detach() for name, p in whole.items()}, norms, adamw


def check_layout(rank: int, layout: dict[str, Any]) -> None:
    grid = grid_of(**layout)
    parameters, optimizer, results = train(
        layout, torch.float64, range(3), reduce_bucket_size=100, clip_grad_norm=5.0
    )
    whole, norms, adamw = reference(layout, grid, range(3), clip=5.0)
    assert [result.grad_norm for result in results] == pytest.approx(norms, rel=LAYOUT)
    shards = optimizer.state_shards()
    for name, parameter in parameters.items():
        assert_close(
            parameter.detach(),
            part(whole[name], parameter.spec.shards, grid),
            LAYOUT,
            name,
        )
        for kind in ("exp_avg", "exp_avg_sq"):
            state = shards[f"optim.{kind}.{name}"]
            expected = adamw.state[
                adamw.param_groups[0]["params"][list(parameters).index(name)]
            ][kind]
            assert_close(
                state.tensor,
                part(expected, state.spec.shards, grid),
                LAYOUT,
                f"{kind} {name}",
            )
    # whoever holds the same part of a parameter holds the same bits
    held = all_gather_objects(
        {name: (p.detach(), _place(p, grid)) for name, p in parameters.items()},
        _world(grid),
    )
    for other in held:
        for name, (tensor, place) in other.items():
            if place == held[rank][name][1]:
                assert torch.equal(tensor, parameters[name]), name


def _place(parameter: nn.Parameter, grid: Grid) -> tuple[int, ...]:
    return tuple(getattr(grid, name).rank for name, _ in parameter.spec.shards)  # type: ignore[attr-defined]


def _world(grid: Grid) -> Axis:
    rank = torch.distributed.get_rank()
    return Axis(
        "world", torch.distributed.get_world_size(), rank, torch.distributed.group.WORLD
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_equals_one_process(pool: Pool, layout: dict[str, Any]) -> None:
    pool.run(check_layout, layout)


def check_half(rank: int, layout: dict[str, Any]) -> None:
    grid = grid_of(**layout)
    parameters, optimizer, _ = train(
        layout, torch.bfloat16, range(3), clip_grad_norm=0.0
    )
    shards = optimizer.state_shards()
    for name, parameter in parameters.items():
        master = shards[f"optim.master.{name}"]
        assert master.tensor.dtype == torch.float32
        rows = parameter.detach()
        if len(master.spec.shards) > len(parameter.spec.shards):
            axis = getattr(grid, master.spec.shards[-1][0])
            rows = rows.chunk(axis.size)[axis.rank]
        assert torch.equal(rows, master.tensor.bfloat16()), name


@pytest.mark.parametrize("layout", [{"zero1": 4}, {"zero1": 2}, {"tensor": 2}], ids=str)
def test_half_parameters_are_their_masters_rounded(
    pool: Pool, layout: dict[str, Any]
) -> None:
    pool.run(check_half, layout)


def check_overflow(rank: int, layout: dict[str, Any], bad: float) -> StepResult:
    parameters, optimizer, _ = train(layout, torch.bfloat16, range(1))
    before = {
        name: t.clone() for name, t in (optimizer.state_tensors() | parameters).items()
    }
    give_gradients(parameters, layout, 1)
    if rank == 3:
        optimizer.slots[1].gradient_rows()[-1, -1] = bad
    result = optimizer.step(0.1, 0.9, 1.0)
    after = optimizer.state_tensors() | parameters
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert optimizer.state() == {"steps": 1}
    return result


@pytest.mark.parametrize(
    "layout", [{"zero1": 4}, {"tensor": 2, "zero1": 1}, {"pipeline": 2}], ids=str
)
@pytest.mark.parametrize(("bad", "found"), [(math.inf, "inf"), (math.nan, "nan")])
def test_an_overflow_on_one_rank_skips_the_step_on_all(
    pool: Pool, layout: dict[str, Any], bad: float, found: str
) -> None:
    assert [result.check for result in pool.run(check_overflow, layout, bad)] == [
        found
    ] * 4


def bits(
    rank: int, layout: dict[str, Any], dtype: torch.dtype, zero: dict[str, Any]
) -> dict[str, Tensor]:
    parameters, optimizer, _ = train(layout, dtype, range(3), **zero)
    return {
        name: t.detach().clone()
        for name, t in (parameters | optimizer.state_tensors()).items()
    }


@pytest.mark.parametrize("layout", [{"zero1": 4}, {"zero1": 1}, {"zero1": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bucket_sizes_change_no_bit(
    pool: Pool, layout: dict[str, Any], dtype: torch.dtype
) -> None:
    plain = pool.run(bits, layout, dtype, {})
    for zero in (
        {"reduce_bucket_size": 1},
        {"reduce_bucket_size": 130},
        {"use_split_tensor_optim": True},
        {"use_split_tensor_optim": True, "all_gather_size": 130},
    ):
        for ours, theirs in zip(
            pool.run(bits, layout, dtype, zero), plain, strict=True
        ):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), zero


@covers("hybrid_zero_optimizer.use_split_tensor_optim")
def test_dividing_the_state_changes_no_bit(pool: Pool) -> None:
    """On the CPU a sum over ranks has one order, and AdamW does not see where its rows lie."""
    whole, divided = (
        pool.run(bits, {"zero1": zero}, torch.float32, {}) for zero in (1, 4)
    )
    for a, b in zip(whole, divided, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in TP)
