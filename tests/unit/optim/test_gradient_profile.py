"""What ``grad_profiling`` measures on one process: which layers, of which steps, in gradients of every kind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from evomesh.config.grad_profiling import GradProfilingConfig, chosen_layer
from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.errors import UserError
from evomesh.optim.gradient_profile import GradientFigures, GradientProfile
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from tests.support.covers import covers


def optimizer_of(dtype: torch.dtype = torch.float32) -> ZeroOptimizer:
    """Parameters of two blocks and a head, whose gradients the tests write."""
    shapes = {
        "embedding.weight": (3, 2),
        "layers.0.wo.weight": (2, 2),
        "layers.0.wo.bias": (2,),
        "layers.1.wo.weight": (2, 2),
        "head.weight": (3, 2),
    }
    named = []
    for name, shape in shapes.items():
        named.append((name, nn.Parameter(torch.ones(shape, dtype=dtype))))
    return ZeroOptimizer(named, AdamConfig(), ZeroConfig(clip_grad_norm=1e-3))


def measure(
    optimizer: ZeroOptimizer, inv_scale: float = 1.0, **settings: object
) -> GradientFigures:
    config = GradProfilingConfig.model_validate(settings)
    profile = GradientProfile(config, optimizer.slots, Grid(), tied=False)
    result = optimizer.step(1e-3, 0.9, inv_scale, profile)
    assert result.profile is not None
    return profile.figures(result.profile, inv_scale)


def write_gradients(optimizer: ZeroOptimizer, value: float = 3.0) -> None:
    """Give every parameter a gradient of two kinds of elements, 0 and ``value``."""
    for slot in optimizer.slots:
        gradient = torch.zeros_like(slot.param)
        gradient.view(-1)[:2] = value
        (slot.param * gradient).sum().backward()


@covers("grad_profiling.layers")
@pytest.mark.parametrize(
    "layers", [("layers.0", "head"), ("SomeBlock0", "ScaleColumnParallelLinear")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chosen_layers_with_norms_and_zeros(
    layers: tuple[str, ...], dtype: torch.dtype
) -> None:
    optimizer = optimizer_of(dtype)
    write_gradients(optimizer)
    found = measure(
        optimizer,
        grad_norm_profiling=True,
        zero_grad_profiling=True,
        layers=layers,
    )
    root = math.sqrt(18)  # of two elements of 3
    assert found.scalars == {
        "layer_grad_norm/layers.0": pytest.approx(6.0),
        "layer_grad_norm/head": pytest.approx(root),
        "param_grad_norm/layers.0.wo.weight": pytest.approx(root),
        "param_grad_norm/layers.0.wo.bias": pytest.approx(root),
        "param_grad_norm/head.weight": pytest.approx(root),
        "layer_zero_grad/layers.0": 2,
        "layer_zero_grad/head": 4,
        "param_zero_grad/layers.0.wo.weight": 2,
        "param_zero_grad/layers.0.wo.bias": 0,
        "param_zero_grad/head.weight": 4,
    }
    assert found.vocab_norms is None


def test_rows_of_the_head_alone() -> None:
    optimizer = optimizer_of()
    write_gradients(optimizer)
    found = measure(optimizer, 0.5, vocab_grad_norm_profiling=True)
    assert found.scalars == {}
    assert found.vocab_norms is not None
    assert found.vocab_norms.tolist() == pytest.approx([math.sqrt(18) / 2, 0, 0])


def test_a_parameter_that_nothing_used_has_the_norm_0_and_zeros_only() -> None:
    optimizer = optimizer_of()
    found = measure(
        optimizer,
        grad_norm_profiling=True,
        zero_grad_profiling=True,
        vocab_grad_norm_profiling=True,
        layers=("head",),
    )
    assert found.scalars["param_grad_norm/head.weight"] == 0
    assert found.scalars["param_zero_grad/head.weight"] == 6
    assert found.vocab_norms is not None
    assert found.vocab_norms.tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_skipped_step_shows_which_layer_is_not_finite(value: float) -> None:
    optimizer = optimizer_of()
    write_gradients(optimizer)
    gradient = optimizer.slots[3].param.grad
    assert gradient is not None
    gradient[0, 0] = value
    found = measure(optimizer, grad_norm_profiling=True, zero_grad_profiling=True)
    assert not math.isfinite(found.scalars["layer_grad_norm/layers.1"])
    assert found.scalars["layer_grad_norm/layers.0"] == pytest.approx(6.0)
    assert found.scalars["layer_zero_grad/layers.1"] == 2


def test_the_square_of_a_layer_may_be_too_large_for_float32() -> None:
    optimizer = optimizer_of()
    write_gradients(optimizer, 2.0**63)
    found = measure(optimizer, 2.0**-63, grad_norm_profiling=True)
    assert found.scalars["layer_grad_norm/layers.0"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": ("layers.2",), "zero_grad_profiling": True}, "layers.2"),
        ({"layers": ("norm",), "grad_norm_profiling": True}, "layers.0, layers.1"),
    ],
)
def test_a_layer_that_a_custom_model_does_not_have(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        measure(optimizer_of(), **settings)


def test_a_custom_model_without_a_head() -> None:
    config = GradProfilingConfig(vocab_grad_norm_profiling=True)
    slots = optimizer_of().slots[:-1]
    with pytest.raises(UserError, match=r"head\.weight"):
        GradientProfile(config, slots, Grid(), tied=False)


@covers("grad_profiling.interval_steps")
def test_steps_that_are_measured() -> None:
    every_third = GradProfilingConfig(zero_grad_profiling=True, interval_steps=3)
    assert [step for step in range(8) if every_third.is_due(step)] == [0, 3, 6]
    assert not GradProfilingConfig(interval_steps=1).is_due(0)


def test_the_head_of_a_tied_model_is_its_embedding() -> None:
    assert chosen_layer("ScaleColumnParallelLinear", tied=True) == "embedding"
    assert chosen_layer("PackedFlashInternLm1DBlock7", tied=True) == "layers.7"
