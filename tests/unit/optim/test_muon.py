"""Muon against ``torch.optim.Muon``, numpy's singular vectors and the formula of its update."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evomesh.checkpoint.huggingface.names import (
    NAME_MAPS,
    native_to_foreign,
    tensor_links,
)
from evomesh.config.optimizer import OptimizerConfig
from evomesh.config.schema import AdamConfig, ModelConfig, ZeroConfig
from evomesh.errors import UserError
from evomesh.models.registry import build_model
from evomesh.optim import muon
from evomesh.optim.groups import is_hidden_matrix
from evomesh.optim.orthogonal import orthogonalize, update_directions
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.spec import ShardSpec, spec_of, with_spec
from tests.support.covers import covers
from tests.support.tolerances import assert_equal_bits, distance

RATE, DECAY = 0.02, 0.1
SHAPES = [(12, 7), (7, 12), (6, 6)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def optimizer_of(
    weights: dict[str, nn.Parameter], adam: AdamConfig | None = None, **keys: object
) -> ZeroOptimizer:
    config = OptimizerConfig.model_validate({"type": "muon", **keys})
    adam = adam or AdamConfig(weight_decay=DECAY)
    zero = ZeroConfig(clip_grad_norm=0.0)
    return ZeroOptimizer(weights.items(), adam, zero, config=config)


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    weights = {}
    for number, shape in enumerate(SHAPES):
        values = draw(*shape, seed=number).to(dtype)
        weights[f"layers.{number}.wo.weight"] = nn.Parameter(values)
    return weights


def polar_factor(matrix: Tensor) -> Tensor:
    left, _, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy(left @ right)


@covers("optimizer.momentum", "optimizer.nesterov", "optimizer.ns_steps")
@pytest.mark.parametrize(
    ("momentum", "nesterov", "steps"),
    [(0.95, True, 5), (0.8, False, 5), (0.9, True, 3)],
)
def test_equals_torch_muon(
    monkeypatch: pytest.MonkeyPatch, momentum: float, nesterov: bool, steps: int
) -> None:
    """In float64: torch's own iterations always round to bfloat16, which is made a copy here."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # before torch 2.15
    ours, theirs = parameters(), parameters()
    optimizer = optimizer_of(ours, momentum=momentum, nesterov=nesterov, ns_steps=steps)
    torch_muon = torch.optim.Muon(
        theirs.values(),
        lr=RATE,
        weight_decay=DECAY,
        momentum=momentum,
        nesterov=nesterov,
        ns_steps=steps,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(4):
        for weights in (ours, theirs):
            for number, parameter in enumerate(weights.values()):
                gradient = draw(*parameter.shape, seed=10 * step + number)
                parameter.grad = gradient
        optimizer.step(RATE, 0.95, 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bfloat16", torch.float64)  # from 2.15 on
            torch_muon.step()
    for name, weight in ours.items():
        assert distance(weight.detach(), theirs[name].detach()) < 1e-12, name


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_small_matrices_are_taken_together_up_to_a_size(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Five alike matrices: any number of them at once gives each the direction that it has alone."""
    taken = []

    def update(matrices: Tensor, packed_rows: tuple[int, ...], steps: int) -> Tensor:
        taken.append(len(matrices))
        return update_directions(matrices, packed_rows, steps)

    monkeypatch.setattr(muon, "MOST_ELEMENTS", most * 12 * 7)
    monkeypatch.setattr(muon, "update_directions", update)
    weights = {
        f"layers.{number}.wo.weight": nn.Parameter(draw(12, 7, seed=number))
        for number in range(5)
    }
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = optimizer_of(weights, nesterov=False)
    for number, weight in enumerate(weights.values()):
        weight.grad = draw(12, 7, seed=9 + number)
    optimizer.step(RATE, 0.95, 1.0)
    assert taken == {1: [1] * 5, 2: [2] * 3, 3: [3] * 2, 100: [5]}[most]
    for number, (name, weight) in enumerate(weights.items()):
        alone = update_directions(draw(12, 7, seed=9 + number), (), 5)
        expected = before[name] * (1 - RATE * DECAY) - RATE * alone
        assert distance(weight.detach(), expected) < 1e-13, name


def test_float64_equals_the_formula() -> None:
    weights = parameters()
    optimizer = optimizer_of(weights)
    momenta = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    expected = {name: weight.detach().clone() for name, weight in weights.items()}
    for step in range(3):
        for number, (name, weight) in enumerate(weights.items()):
            gradient = draw(*weight.shape, seed=100 * step + number)
            weight.grad = gradient.clone()
            momentum = momenta[name].mul_(0.95).add_(0.05 * gradient)
            ahead = 0.05 * gradient + 0.95 * momentum
            x = ahead / ahead.square().sum().sqrt()
            for _ in range(5):
                outer = x @ x.T
                x = 3.4445 * x - 4.7750 * outer @ x + 2.0315 * outer @ outer @ x
            scale = 0.2 * math.sqrt(max(weight.shape))
            decayed = expected[name] * (1 - RATE * DECAY)
            expected[name] = decayed - RATE * scale * x
        optimizer.step(RATE, 0.95, 1.0)
    for name, weight in weights.items():
        assert distance(weight.detach(), expected[name]) < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_direction_is_near_the_polar_factor(shape: tuple[int, int]) -> None:
    """Singular values end between 0.6 and 1.3, the singular vectors are exact."""
    matrix = draw(*shape)
    direction = orthogonalize(matrix, 5)
    factor = polar_factor(matrix)
    values = np.linalg.svd(direction.numpy(), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    # U f(S) V' times (U V')' is symmetric, with f(S) as its eigenvalues.
    product = direction @ factor.T if shape[0] <= shape[1] else factor.T @ direction
    assert distance(product, product.T.contiguous()) < 1e-12
    assert np.linalg.eigvalsh(product.numpy()).min() > 0.6


def test_update_has_the_size_of_adamws() -> None:
    for shape in ((64, 64), (32, 128), (256, 32)):
        direction = update_directions(draw(*shape), (), 5)
        rms = direction.square().mean().sqrt()
        assert 0.14 < rms < 0.26, shape


def test_packed_matrices_are_orthogonalized_apart() -> None:
    """Two key/value heads of three queries each, head dim 2: rows q q q k v, q q q k v."""
    packed = draw(20, 9)
    by_head = packed.view(2, 5, 2, 9)
    found = update_directions(packed, (6, 2, 2), 5).view(2, 5, 2, 9)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 5)):
        alone = by_head[:, rows].reshape(-1, 9)
        direction = orthogonalize(alone, 5) * 0.2 * math.sqrt(max(alone.shape))
        assert distance(found[:, rows].reshape(-1, 9), direction) < 1e-13


def test_packed_rows_reach_the_update() -> None:
    spec = ShardSpec((20, 9), packed_rows=(6, 2, 2))
    values = draw(20, 9)
    weight = with_spec(nn.Parameter(values.clone()), spec)
    optimizer = optimizer_of(
        {"layers.0.attention.wqkv.weight": weight}, AdamConfig(weight_decay=0.0)
    )
    gradient = draw(20, 9, seed=1)
    weight.grad = gradient.clone()
    optimizer.step(1.0, 0.95, 1.0)
    expected = update_directions(gradient, (6, 2, 2), 5)
    assert distance(values - weight.detach(), expected) < 1e-12


def test_attention_says_how_its_matrix_is_packed() -> None:
    """The key rows that the spec names are those that the converter to Hugging Face writes as k_proj."""
    config = ModelConfig(
        model_type="LLAMA2",
        num_layers=1,
        hidden_size=32,
        num_attention_heads=8,
        num_kv_attention_heads=2,
        vocab_size=20,
        mlp_ratio=1.0,
        multiple_of=8,
        no_bias=True,
    )
    model = build_model(config)
    for name, parameter in model.named_parameters():
        packed = spec_of(parameter).packed_rows
        # Four query heads for each key/value head, of 4 rows.
        assert packed == ((16, 4, 4) if "wqkv" in name else ()), name
    rows = torch.arange(48.0)[:, None].expand(48, 32)
    naming = NAME_MAPS["llama"]
    (link,) = (link for link in tensor_links(config, naming) if "wqkv" in link.native)
    _, keys, _ = native_to_foreign(link, rows, config, naming)
    assert set(keys[:, 0].tolist()) == {*range(16, 20), *range(40, 44)}


def test_experts_of_a_stack_are_separate_matrices() -> None:
    stack = draw(3, 8, 5)
    found = update_directions(stack, (), 5)
    for expert, direction in zip(stack, found, strict=True):
        assert distance(direction, update_directions(expert, (), 5)) < 1e-13
    assert is_hidden_matrix("layers.0.experts.w1.weight", stack.shape)


@covers("optimizer.ns_dtype")
def test_dtype_of_the_iterations() -> None:
    moved = {}
    for dtype in ("bfloat16", "float32"):
        weights = parameters(torch.float32)
        optimizer = optimizer_of(weights, ns_dtype=dtype)
        for weight in weights.values():
            weight.grad = draw(*weight.shape, seed=5).float()
        optimizer.step(RATE, 0.95, 1.0)
        moved[dtype] = torch.cat([w.detach().flatten() for w in weights.values()])
    reference = parameters()
    optimizer = optimizer_of(reference)
    for weight in reference.values():
        weight.grad = draw(*weight.shape, seed=5)
    optimizer.step(RATE, 0.95, 1.0)
    exact = torch.cat([w.detach().flatten() for w in reference.values()])
    assert distance(moved["float32"], exact) < 1e-6
    assert 1e-5 < distance(moved["bfloat16"], exact) < 1e-2


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.3.attention.wqkv.weight", (24, 8), True),
        ("layers.3.feed_forward.w1.weight", (24, 8), True),
        ("layers.3.feed_forward.w1.bias", (24,), False),
        ("layers.3.attention_norm.weight", (8,), False),
        ("embedding.weight", (99, 8), False),
        ("head.weight", (99, 8), False),
        ("model.0.lm_head.weight", (99, 8), False),
    ],
)
def test_which_parameters_are_hidden_matrices(
    name: str, shape: tuple[int, ...], expected: bool
) -> None:
    assert is_hidden_matrix(name, shape) is expected


def test_others_are_left_to_adamw() -> None:
    """Beside a matrix of a block, the embedding moves as if AdamW were alone."""
    values = draw(9, 4)
    alone = nn.Parameter(values.clone())
    together = nn.Parameter(values.clone())
    adam = AdamConfig(weight_decay=DECAY)
    optimizers = [
        ZeroOptimizer(
            [("embedding.weight", alone)], adam, ZeroConfig(clip_grad_norm=0)
        ),
        optimizer_of({**parameters(), "embedding.weight": together}, adam),
    ]
    for step in range(3):
        for weight, optimizer in zip((alone, together), optimizers, strict=True):
            weight.grad = draw(9, 4, seed=step)
            optimizer.step(RATE, 0.95, 1.0)
            optimizer.zero_grad()
    assert_equal_bits(together.detach(), alone.detach())


@pytest.mark.parametrize("rule", ["muon", "lion", "schedule_free"])
def test_a_gradient_that_is_not_finite_changes_nothing(rule: str) -> None:
    weights = parameters(torch.float32)
    optimizer = optimizer_of(weights, type=rule)

    def step(value: float) -> str:
        for weight in weights.values():
            weight.grad = torch.full_like(weight, value)
            weight.grad[0, 0] = 0.5
        return optimizer.step(RATE, 0.95, 1.0).check

    assert step(0.3) == "ok"
    tensors = optimizer.state_tensors() | weights
    state = optimizer.state()
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    assert step(math.nan) == "nan"
    assert step(math.inf) == "inf"
    assert optimizer.state() == state and state["steps"] == 1
    for name, tensor in tensors.items():
        assert_equal_bits(tensor.detach(), before[name], name)
    assert step(0.3) == "ok" and optimizer.state()["steps"] == 2


def test_loss_scale_and_clipping_come_before_the_momentum() -> None:
    plain, scaled = parameters(torch.float32), parameters(torch.float32)
    for weights, scale in ((plain, 1.0), (scaled, 1024.0)):
        optimizer = optimizer_of(weights)
        for weight in weights.values():
            weight.grad = draw(*weight.shape, seed=8).float() * scale
        optimizer.step(RATE, 0.95, 1.0 / scale)
        momentum = optimizer.state_tensors()["optim.momentum.layers.0.wo.weight"]
        gradient = draw(*momentum.shape, seed=8).float()
        assert distance(momentum, 0.05 * gradient) < 1e-6


def test_model_without_matrices_is_refused() -> None:
    weights = {
        "embedding.weight": nn.Parameter(draw(9, 4)),
        "layers.0.norm.weight": nn.Parameter(draw(4)),
    }
    with pytest.raises(UserError, match="none of the model's 2 trained parameters"):
        optimizer_of(weights)
