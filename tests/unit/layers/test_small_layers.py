"""Embedding, norms and feed-forward networks against torch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from evomesh.layers.embedding import Embedding, sum_rows
from evomesh.layers.linear import ColumnParallelLinear, RowParallelLinear
from evomesh.layers.mlp import FeedForward
from evomesh.layers.norm import Norm
from evomesh.layers.placement import Placement
from evomesh.parallel.grid import Axis
from evomesh.parallel.modes import MODES
from evomesh.parallel.spec import spec_of
from tests.support.covers import covers

F64 = Placement(dtype=torch.float64)


def randomise(module: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def test_embedding_gradient_adds_up_and_is_scaled() -> None:
    layer = Embedding(7, 3, grad_scale=0.1, split_hidden=False, placement=F64)
    randomise(layer)
    ids = torch.tensor([1, 2, 1, 6, 1])
    seen = torch.randn(5, 3, dtype=torch.float64)
    out = layer(ids)
    assert torch.equal(out, layer.weight[ids])
    (ours,) = torch.autograd.grad(out, layer.weight, seen)
    (theirs,) = torch.autograd.grad(F.embedding(ids, layer.weight), layer.weight, seen)
    torch.testing.assert_close(ours, theirs * 0.1, rtol=1e-14, atol=0)


def test_embedding_gradient_of_a_frequent_token_is_summed_in_float32() -> None:
    layer = Embedding(
        2,
        1,
        grad_scale=1.0,
        split_hidden=False,
        placement=Placement(dtype=torch.bfloat16),
    )
    randomise(layer)
    (grad,) = torch.autograd.grad(
        layer(torch.zeros(1000, dtype=torch.long)),
        layer.weight,
        torch.ones(1000, 1, dtype=torch.bfloat16),
    )
    # One after the other in bfloat16, the sum would stick at 256.
    assert grad[0].item() == 1000


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_embedding_gradient_on_a_device_uses_the_operator_that_sums_in_one_order() -> (
    None
):
    """index_add_ on CUDA adds with atomics; the meta device stands for CUDA here."""
    placement = Placement(dtype=torch.bfloat16, device=torch.device("meta"))
    layer = Embedding(9, 4, grad_scale=1.0, split_hidden=False, placement=placement)
    with Operators() as ran:
        layer(torch.zeros(5, dtype=torch.long, device="meta")).sum().backward()
    assert "embedding_dense_backward" in ran.names
    assert not {"index_add_", "index_add", "scatter_add_", "index_put_"} & set(
        ran.names
    )
    assert layer.weight.grad.dtype is torch.bfloat16


def test_both_ways_to_sum_rows_are_the_same_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (400,), generator=generator)
    values = torch.randn(400, 6, dtype=torch.float64, generator=generator)
    theirs = torch.ops.aten.embedding_dense_backward(values, ids, 50, -1, False)
    torch.testing.assert_close(
        sum_rows(values, ids, 50), theirs, rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm_against_the_formula(kind: str, dtype: torch.dtype) -> None:
    layer = Norm(
        kind, 16, eps=1e-3, fp32_weight=False, placement=Placement(dtype=dtype)
    )
    randomise(layer)
    x = torch.randn(5, 16, dtype=torch.float64).to(dtype).requires_grad_()
    seen = torch.randn(5, 16, dtype=torch.float64)
    wide = x.double()
    if kind == "layernorm":
        wide = wide - wide.mean(1, keepdim=True)
    expected = (
        layer.weight.double() * wide / (wide.pow(2).mean(1, keepdim=True) + 1e-3).sqrt()
    )
    if layer.bias is not None:
        expected = expected + layer.bias.double()
    ours = layer(x)
    assert ours.dtype is dtype
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 2e-6,
        torch.bfloat16: 2e-2,
        torch.float16: 2e-3,
    }[dtype]
    leaves = [x, *layer.parameters()]
    pairs = zip(
        [ours, *torch.autograd.grad(ours, leaves, seen.to(dtype))],
        [expected, *torch.autograd.grad(expected, leaves, seen)],
        strict=True,
    )
    for a, b in pairs:
        assert (
            a.double() - b.double()
        ).abs().max() <= tolerance * b.double().abs().max()


@covers("use_fp32_norm")
def test_fp32_norm_keeps_its_weight_wide_and_its_output_narrow() -> None:
    layer = Norm(
        "rmsnorm",
        8,
        eps=1e-5,
        fp32_weight=True,
        placement=Placement(dtype=torch.bfloat16),
    )
    randomise(layer)
    assert layer.weight.dtype is torch.float32
    assert layer(torch.randn(2, 8)).dtype is torch.bfloat16
    assert (
        Norm("rmsnorm", 8, eps=1e-5, fp32_weight=True, placement=F64).weight.dtype
        is torch.float64
    )


@pytest.mark.parametrize("swiglu", [True, False])
def test_feed_forward(swiglu: bool) -> None:
    layer = FeedForward(6, 10, swiglu=swiglu, placement=F64)
    randomise(layer)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(4, 6, dtype=torch.float64)
    first = x @ layer.w1.weight.T
    if swiglu:
        expected = (
            first / (1 + torch.exp(-first)) * (x @ layer.w3.weight.T)
        ) @ layer.w2.weight.T
    else:
        inner = torch.tanh((2 / torch.pi) ** 0.5 * (first + 0.044715 * first**3))
        expected = (0.5 * first * (1 + inner)) @ layer.w2.weight.T
    names = {name for name, _ in layer.named_parameters()}
    assert names == (
        {"w1.weight", "w2.weight", "w3.weight"}
        if swiglu
        else {"w1.weight", "w2.weight"}
    )
    leaves = [x, *layer.parameters()]
    ours = layer(x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, seen),
        torch.autograd.grad(expected, leaves, seen),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_specs_describe_the_local_shapes(mode: str) -> None:
    placement = Placement(axis=Axis("tp", 2, 1), mode=MODES[mode])
    for layer in (
        ColumnParallelLinear(8, 12, bias=True, placement=placement),
        RowParallelLinear(8, 12, bias=True, placement=placement),
        Norm("layernorm", 8, eps=1e-5, fp32_weight=False, placement=placement),
        Embedding(
            10,
            8,
            grad_scale=1.0,
            split_hidden=False,
            placement=placement.on_tensor_axis(),
        ),
        Embedding(
            10,
            8,
            grad_scale=1.0,
            split_hidden=True,
            placement=placement.on_tensor_axis(),
        ),
    ):
        for parameter in layer.parameters():
            spec = spec_of(parameter)
            local = list(spec.shape)
            for axis, dim in spec.shards:
                # What the weight sharding cuts is whole until it has wrapped the block.
                local[dim] //= 2 if axis == "tp" else 1
            assert tuple(parameter.shape) == tuple(local)
