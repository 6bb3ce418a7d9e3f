"""Schedule-Free AdamW against the recurrences of its paper, with x, y and z each kept, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from evomesh.config.optimizer import OptimizerConfig
from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.optim.zero import ZeroOptimizer
from tests.support.tolerances import assert_equal_bits

BETA1, BETA2, EPS, DECAY = 0.9, 0.95, 1e-8, 0.1


def optimizer_of(weight: nn.Parameter) -> ZeroOptimizer:
    adam = AdamConfig(adam_beta1=BETA1, adam_eps=EPS, weight_decay=DECAY)
    config = OptimizerConfig(type="schedule_free")
    zero = ZeroConfig(clip_grad_norm=0.0)
    return ZeroOptimizer([("w.weight", weight)], adam, zero, config=config)


def test_equals_the_recurrences() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(5, 4))
    z, v, total = x.copy(), np.zeros_like(x), 0.0
    weight = nn.Parameter(torch.from_numpy(x.copy()))
    optimizer = optimizer_of(weight)
    for step in range(8):
        # A rate of 0 first, then a warm-up, then constant.
        lr = min(step, 3) * 0.02
        y = (1 - BETA1) * z + BETA1 * x
        np.testing.assert_allclose(weight.detach().numpy(), y, rtol=0, atol=1e-13)
        g = draw.normal(size=x.shape)
        weight.grad = torch.from_numpy(g.copy())
        optimizer.step(lr, BETA2, 1.0)
        v = BETA2 * v + (1 - BETA2) * g * g
        root = np.sqrt(v / (1 - BETA2 ** (step + 1)))
        z = z - lr * (g / (root + EPS) + DECAY * y)
        total += lr**2
        c = lr**2 / total if total else 0.0
        x = (1 - c) * x + c * z
        with optimizer.evaluated_weights():
            np.testing.assert_allclose(weight.detach().numpy(), x, rtol=0, atol=1e-13)
    assert optimizer.state()["weight_sum"] == pytest.approx(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_loaded_where_it_was_stored(dtype: torch.dtype) -> None:
    """As a resume does it: weights are the average, masters are y; the next steps are equal to the bit."""

    def step(weight: nn.Parameter, optimizer: ZeroOptimizer, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        loss = (weight * torch.randn(6, 4, generator=draw).to(dtype)).sum()
        loss.backward()
        optimizer.step(0.1, BETA2, 1.0)
        optimizer.zero_grad()

    weight = nn.Parameter(torch.ones(6, 4, dtype=dtype))
    optimizer = optimizer_of(weight)
    for seed in range(3):
        step(weight, optimizer, seed)
    with optimizer.evaluated_weights():
        stored = {"w.weight": weight.detach().clone()}
        tensors = optimizer.state_tensors()
        stored |= {name: tensor.clone() for name, tensor in tensors.items()}
        state = optimizer.state()
    assert set(stored) == {
        "w.weight",
        "optim.z.w.weight",
        "optim.exp_avg_sq.w.weight",
        "optim.master.w.weight",
    }

    other = nn.Parameter(torch.zeros(6, 4, dtype=dtype))
    resumed = optimizer_of(other)
    with resumed.evaluated_weights():
        targets = {"w.weight": other.detach(), **resumed.state_tensors()}
        for name, tensor in targets.items():
            tensor.copy_(stored[name])
    resumed.load_state(state)
    assert_equal_bits(other.detach(), weight.detach())
    for seed in range(3, 6):
        step(weight, optimizer, seed)
        step(other, resumed, seed)
    assert_equal_bits(other.detach(), weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_alone_begin_all_sequences(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(6, 4, dtype=dtype))
    optimizer = optimizer_of(weight)
    loaded = torch.randn(6, 4).to(dtype)
    with optimizer.evaluated_weights():
        weight.detach().copy_(loaded)
        optimizer.refresh_masters()
    assert_equal_bits(weight.detach(), loaded)
    assert_equal_bits(optimizer.state_tensors()["optim.z.w.weight"].to(dtype), loaded)
    with optimizer.evaluated_weights():
        assert_equal_bits(weight.detach(), loaded)
