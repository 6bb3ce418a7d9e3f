"""Attention of 16-bit heads by the device's own kernel, against dense attention in float64 of the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evomesh.layers import attention
from evomesh.layers.attention import attend
from evomesh.layers.sequence_bounds import SequenceBounds
from tests.support.tolerances import distance

BOUND = 2e-2  # a few roundings of bfloat16, relative to the largest element


def documents(lengths: list[int], device: torch.device) -> SequenceBounds:
    bounds = torch.tensor([0, *lengths, 0, 0]).cumsum(0).int()
    return SequenceBounds(
        torch.cat([torch.arange(n) for n in lengths]).to(device),
        bounds.to(device),
        max(lengths),
        bounds,
    )


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    document = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(lengths)
    )
    allowed = (document[:, None] == document[None]) & torch.ones(
        len(q), len(q), dtype=torch.bool
    ).tril()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qnh,knh->nqk", q, k) / q.shape[2] ** 0.5
    return torch.einsum(
        "nqk,knh->qnh", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v
    )


@pytest.mark.parametrize("lengths", [[300], [5, 1, 1, 130, 163], [1] * 7 + [293]])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (4, 2, 24), (4, 1, 20)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_dense_attention_in_value_and_gradient(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: list[int],
) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    values = [
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]
    ours = [x.to(device).requires_grad_() for x in values[:3]]
    theirs = [x.double().requires_grad_() for x in values[:3]]
    found = attend(*ours, documents(lengths, device))
    expected = dense(*theirs, lengths)
    assert found.dtype == dtype and distance(found.cpu(), expected) <= BOUND
    gradients = torch.autograd.grad(found, ours, values[3].to(device))
    references = torch.autograd.grad(expected, theirs, values[3].double())
    for gradient, reference in zip(gradients, references, strict=True):
        assert distance(gradient.cpu(), reference) <= BOUND


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("head_dim", "dtype", "takes"),
    [(128, "bfloat16", True), (20, "bfloat16", False), (128, "float32", False)],
)
def test_which_heads_go_to_the_kernel(head_dim: int, dtype: str, takes: bool) -> None:
    q = torch.empty(3, 2, head_dim, dtype=getattr(torch, dtype), device="cuda")
    assert attention._flash_takes(q) == (
        takes and torch.cuda.get_device_capability() >= (8, 0)
    )
