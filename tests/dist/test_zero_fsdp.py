"""ZeroOptimizer over blocks whose weights FSDP2 divides, as in isp: wp cuts the weights, zero their optimizer state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.spec import ShardSpec, with_spec
from tests.support.pool import Pool, grid_of
from tests.support.tolerances import LAYOUT, assert_close

ADAM = AdamConfig(adam_eps=1e-2)
MICRO_BATCHES = 2


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def inputs(rank: int, step: int, index: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank * 100 + step * 10 + index)
    return torch.randn(5, 8, generator=generator, dtype=torch.float64).to(dtype)


def train(
    rank: int, layout: dict[str, Any], dtype: torch.dtype, zero: dict[str, Any]
) -> dict[str, Tensor]:
    grid = grid_of(**layout)
    model = Model(dtype)
    mesh = DeviceMesh.from_group(grid.wp.group, "cpu")
    for layer in model.layers:
        fully_shard(
            layer,
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(
                reduce_dtype=torch.promote_types(dtype, torch.float32)
            ),
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for parameter in model.parameters():
        with_spec(parameter, ShardSpec(tuple(parameter.shape), (("wp", 0),)))
    optimizer = ZeroOptimizer(
        model.named_parameters(), ADAM, ZeroConfig.model_validate(zero), grid, model
    )
    for step in range(3):
        optimizer.expect_micro_batches(MICRO_BATCHES)
        for index in range(MICRO_BATCHES):
            model(inputs(rank, step, index, dtype)).square().sum().backward()
        assert optimizer.step(1e-2, 0.9, 1.0).check == "ok"
        optimizer.zero_grad()
    optimizer.wait_for_parameters()
    whole = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole[name] = parameter.full_tensor().detach()
    state = optimizer.state_tensors()["optim.exp_avg.layers.0.weight"]
    assert state.shape == (8 // grid.wp.size // grid.zero.size, 8)
    return whole


LAYOUTS = [
    {"mode": "isp", "weight": 2, "zero1": 2},
    {"mode": "isp", "weight": 2, "zero1": 1},
    {"mode": "isp", "weight": 4},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_one_process(pool: Pool, layout: dict[str, Any]) -> None:
    model = Model(torch.float64)
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=1e-2,
        betas=(0.9, 0.9),
        eps=1e-2,
        weight_decay=0.01,
        foreach=False,
    )
    for step in range(3):
        for rank in range(4):
            for index in range(MICRO_BATCHES):
                model(
                    inputs(rank, step, index, torch.float64)
                ).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    for whole in pool.run(train, layout, torch.float64, {}):
        for name, parameter in model.named_parameters():
            assert_close(whole[name], parameter.detach(), LAYOUT, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap_changes_no_bit(pool: Pool, dtype: torch.dtype) -> None:
    plain = pool.run(train, LAYOUTS[0], dtype, {})
    for zero in (
        {"overlap_sync_grad": True, "reduce_bucket_size": 40},
        {"overlap_sync_param": True},
    ):
        for ours, theirs in zip(
            pool.run(train, LAYOUTS[0], dtype, zero), plain, strict=True
        ):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), zero
