"""Matrix products against float64, by torch's own kernels and by oneDNN's, whichever this machine would take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evomesh.config.schema import IGNORE
from evomesh.layers import products
from evomesh.layers.loss import linear_cross_entropy
from evomesh.layers.products import linear, matmul_nt

T, I, O = 70, 24, 40  # noqa: E741  # rows, input and output features
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums of up to 70 terms of order 1


class Kernels(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part in name for name in self.names)


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def one_dnn(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    yield request.param


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(shape, generator=generator).requires_grad_() for shape in shapes
    ]


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def same(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact, **TOLERANCE)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 8, T])
def test_a_product_and_its_gradients(one_dnn: bool, biased: bool, rows: int) -> None:
    ours = leaves((rows, I), (O, I), (O,))[: 2 + biased]
    exact = wide(ours)
    with Kernels() as kernels:
        out = linear(*ours)
        grads = torch.autograd.grad(out, ours, torch.ones_like(out).cumsum(0) / rows)
    expected = exact[0] @ exact[1].T + (exact[2] if biased else 0)
    same(out, expected)
    for a, b in zip(
        grads,
        torch.autograd.grad(
            expected, exact, torch.ones_like(expected).cumsum(0) / rows
        ),
        strict=True,
    ):
        same(a, b)
    assert kernels.count("mkldnn::") == (3 if one_dnn else 0)
    assert kernels.count("aten::mm") + kernels.count("aten::addmm") == (
        0 if one_dnn else 3
    )


def test_only_the_wanted_gradients_are_made(one_dnn: bool) -> None:
    x, weight = leaves((T, I), (O, I))
    with Kernels() as kernels:
        linear(x.detach(), weight).sum().backward()
    assert (
        kernels.count("mkldnn::") + kernels.count("aten::mm") == 2
        and weight.grad is not None
    )


@torch.no_grad()
def test_without_gradients(one_dnn: bool) -> None:
    for rows in (1, 8, T):  # 8 rows take a separate path in `linear`
        x, weight, bias = leaves((rows, I), (O, I), (O,))
        same(linear(x, weight, bias), x.double() @ weight.double().T + bias.double())


@torch.no_grad()
def test_transposed_views_and_sums(one_dnn: bool) -> None:
    a, b, total = leaves((I, T), (I, O), (T, O))
    exact = a.double().T @ b.double()
    same(matmul_nt(a.T, b.T), exact)
    before = total.clone()
    same(matmul_nt(a.T, b.T, accumulate=total), exact + total.double())
    assert torch.equal(total, before)


def test_what_one_dnn_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    x, weight = leaves((T, I), (O, I))
    assert products.uses_onednn(x, weight) == torch.backends.mkldnn.is_available()
    assert not products.uses_onednn(x.double(), weight.double())
    assert not products.uses_onednn(x.bfloat16(), weight.bfloat16())
    assert not products.uses_onednn(x.to("meta"), weight.to("meta"))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not products.uses_onednn(x, weight)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        # MKL is the faster one, both being held to AVX2.
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        # Where MKL uses AVX-512 too.
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_f": True}, False),
        ({"cpu_name": "Hygon C86 7490", "avx512_f": True}, True),
        ({}, False),
    ],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch, processor: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    assert products.onednn_is_faster.__wrapped__() == (
        expected and torch.backends.mkldnn.is_available()
    )


def test_two_runs_are_the_same_to_the_bit(one_dnn: bool) -> None:
    x, weight = leaves((T, I), (O, I))
    runs = []
    for _ in range(2):
        out = linear(x, weight)
        runs.append([out, *torch.autograd.grad(out.square().sum(), (x, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("chunk", [16, 512])
def test_the_loss(one_dnn: bool, ignored: str, chunk: int) -> None:
    hidden, weight = leaves((T, I), (O, I))
    labels = torch.randint(0, O, (T,), generator=torch.Generator().manual_seed(1))
    if ignored != "none":
        labels[:: 3 if ignored == "some" else 1] = IGNORE
    exact = wide([hidden, weight])
    out = linear_cross_entropy(
        hidden, weight, labels, vocab_size=O, chunk=chunk, grad_scale=0.3
    )
    logits = exact[0] @ exact[1].T
    expected = 0.3 * torch.nn.functional.cross_entropy(
        logits, labels, reduction="sum", ignore_index=IGNORE
    )
    same(out.scaled_sum, expected)
    ours = torch.autograd.grad(out.scaled_sum, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(expected, exact), strict=True):
        same(a, b)
