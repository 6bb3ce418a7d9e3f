"""Lion against the formula of its paper, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from evomesh.config.optimizer import OptimizerConfig
from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.optim.zero import ZeroOptimizer


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_equals_the_formula(clip: float) -> None:
    draw = np.random.default_rng(0)
    theta = draw.normal(size=(5, 4))
    weight = nn.Parameter(torch.from_numpy(theta.copy()))
    adam = AdamConfig(adam_beta1=0.9, weight_decay=0.3)
    config = OptimizerConfig(type="lion")
    zero = ZeroConfig(clip_grad_norm=clip)
    optimizer = ZeroOptimizer([("w.weight", weight)], adam, zero, config=config)
    m = np.zeros_like(theta)
    for step in range(6):
        g = draw.normal(size=theta.shape)
        weight.grad = torch.from_numpy(g.copy())
        lr, beta2 = 0.01 * (step + 1), 0.98 + 0.001 * step
        optimizer.step(lr, beta2, 1.0)
        if clip:
            g *= min(1.0, clip / (np.linalg.norm(g) + 1e-6))
        u = np.sign(0.9 * m + 0.1 * g)
        theta = theta - lr * (u + 0.3 * theta)
        m = beta2 * m + (1 - beta2) * g
    np.testing.assert_allclose(weight.detach().numpy(), theta, rtol=0, atol=1e-14)
    momentum = optimizer.state_tensors()["optim.momentum.w.weight"]
    np.testing.assert_allclose(momentum.numpy(), m, rtol=0, atol=1e-15)
