from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evomesh.config.schema import IGNORE
from evomesh.layers import loss, loss_gradients, products
from evomesh.layers.loss import (
    CPU_CHUNK_TOKENS_16_BIT,
    MIN_CHUNK_TOKENS,
    LossOutput,
    linear_cross_entropy,
    tokens_per_chunk,
)
from tests.support.covers import covers

T, D, V = 37, 12, 29


def inputs(
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,))
    labels[[0, 5, 6, T - 1]] = IGNORE
    return hidden, weight, labels


def reference_logits(
    hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    logits = hidden @ weight.T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    smoothing: float = 0.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = reference_logits(hidden, weight, softcap)
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return (
        loss,
        F.cross_entropy(logits, labels, reduction="none"),
        logits.argmax(-1) == labels,
    )


def check(
    out: LossOutput,
    leaves: list[torch.Tensor],
    expected: torch.Tensor,
    like: list[torch.Tensor],
) -> None:
    ours = torch.autograd.grad(out.scaled_sum, leaves)
    theirs = torch.autograd.grad(expected, like)
    torch.testing.assert_close(out.scaled_sum, expected, rtol=1e-13, atol=1e-13)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@covers("loss.label_smoothing", "loss.z_loss_coeff", "model.final_logit_softcapping")
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("chunk", [1, 7, 37, 512])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_equals_torch(
    chunk: int, smoothing: float, z_loss: float, softcap: float | None
) -> None:
    hidden, weight, labels = inputs()
    out = linear_cross_entropy(
        hidden,
        weight,
        labels,
        vocab_size=V,
        chunk=chunk,
        label_smoothing=smoothing,
        z_loss_coeff=z_loss,
        softcap=softcap,
        grad_scale=0.37,
    )
    expected, nll, correct = reference(hidden, weight, labels, smoothing, softcap)
    logits = reference_logits(hidden, weight, softcap)
    log_sums = logits.logsumexp(-1)[labels != IGNORE]
    z_term = z_loss * log_sums.square().sum()
    expected = expected + z_term
    if z_loss:
        assert out.scaled_z_loss is not None and not out.scaled_z_loss.requires_grad
        torch.testing.assert_close(
            out.scaled_z_loss, z_term.detach() * 0.37, rtol=1e-13, atol=1e-13
        )
    else:
        assert out.scaled_z_loss is None
    check(out, [hidden, weight], expected * 0.37, [hidden, weight])
    torch.testing.assert_close(out.nll, nll.detach(), rtol=1e-13, atol=1e-13)
    assert torch.equal(out.correct, correct) and not out.nll.requires_grad


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3)])
def test_padded_rows_are_outside_everything(smoothing: float, z_loss: float) -> None:
    hidden, weight, labels = inputs()
    padded = torch.cat(
        [weight.detach(), torch.full((3, D), 50.0, dtype=torch.float64)]
    ).requires_grad_()
    out = linear_cross_entropy(
        hidden,
        padded,
        labels,
        vocab_size=V,
        label_smoothing=smoothing,
        z_loss_coeff=z_loss,
        chunk=8,
    )
    expected, *_ = reference(hidden, weight, labels, smoothing)
    log_sums = (hidden @ weight.T).logsumexp(-1)[labels != IGNORE]
    expected = expected + z_loss * log_sums.square().sum()
    grad_hidden, grad_padded = torch.autograd.grad(out.scaled_sum, [hidden, padded])
    assert torch.equal(grad_padded[V:], torch.zeros(3, D, dtype=torch.float64))
    expected_hidden, expected_weight = torch.autograd.grad(expected, [hidden, weight])
    torch.testing.assert_close(grad_hidden, expected_hidden, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(grad_padded[:V], expected_weight, rtol=1e-11, atol=1e-13)


def test_gradient_follows_the_factor_behind_it() -> None:
    hidden, weight, labels = inputs()
    out = linear_cross_entropy(hidden, weight, labels, vocab_size=V)
    expected, *_ = reference(hidden, weight, labels)
    check(
        LossOutput(out.scaled_sum * -2.5, out.nll, out.correct),
        [hidden, weight],
        expected * -2.5,
        [hidden, weight],
    )


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    hidden, weight, _ = inputs()
    out = linear_cross_entropy(hidden, weight, torch.full((T,), IGNORE), vocab_size=V)
    out.scaled_sum.backward()
    assert out.scaled_sum.item() == 0 and not out.nll.any() and not out.correct.any()
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_confident_and_hopeless_tokens_keep_their_loss() -> None:
    """A probability that underflows to 0 still has a finite loss; one that rounds to 1 a loss of 0."""
    hidden = torch.tensor([[400.0, 0.0], [-400.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    out = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]), vocab_size=2)
    assert out.nll.tolist() == [0.0, 400.0] and out.correct.tolist() == [True, False]


def test_no_gradient_work_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs()
    # The product of the gradient with the weight.
    monkeypatch.setattr(torch, "mm", None)
    with torch.no_grad():
        out = linear_cross_entropy(hidden, weight, labels, vocab_size=V)
    assert not out.scaled_sum.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64_and_sums_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype)
    out = linear_cross_entropy(hidden, weight, labels, vocab_size=V, chunk=8)
    expected, *_ = reference(hidden.double(), weight.double(), labels)
    assert out.nll.dtype is torch.float32 and out.scaled_sum.dtype is torch.float32
    torch.testing.assert_close(out.scaled_sum.double(), expected, rtol=4e-3, atol=0)
    ours = torch.autograd.grad(out.scaled_sum, [hidden, weight])
    for a, b in zip(ours, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        assert a.dtype is dtype
        assert (a.double() - b.double()).abs().max() / b.abs().max() < 2e-2


def test_scale_lifts_float16_gradients_out_of_underflow() -> None:
    hidden, weight, labels = inputs(torch.float16)
    # A loss averaged over so many tokens has gradients below float16's smallest number.
    tokens = 10.0**9
    plain = linear_cross_entropy(
        hidden, weight, labels, vocab_size=V, grad_scale=1 / tokens
    )
    assert not torch.autograd.grad(plain.scaled_sum, hidden)[0].any()
    scaled = linear_cross_entropy(
        hidden, weight, labels, vocab_size=V, grad_scale=torch.tensor(tokens / tokens)
    )
    assert torch.autograd.grad(scaled.scaled_sum, hidden)[0].any()


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [(8000, 4096), (103_168, 4096), (128_256, 4096), (256_000, 2048), (2**21, 512)],
)
def test_chunks_on_cuda_have_tokens_enough_for_the_sum_of_their_gradients(
    rows: int, tokens: int
) -> None:
    assert tokens_per_chunk(rows, on_cuda=True) == tokens
    gibibytes = rows * tokens * 4 / 2**30
    assert gibibytes <= 2 or tokens == MIN_CHUNK_TOKENS


def test_chunks_on_a_cpu_depend_on_the_dtype() -> None:
    assert tokens_per_chunk(8000, on_cuda=False, in_16_bits=False) == MIN_CHUNK_TOKENS
    assert tokens_per_chunk(8000, on_cuda=False) == CPU_CHUNK_TOKENS_16_BIT


@covers("loss.label_smoothing", "loss.z_loss_coeff", "model.final_logit_softcapping")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_blocks_of_a_chunk_change_no_bit_of_its_results(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels = inputs(dtype)

    def results() -> list[Tensor]:
        out = linear_cross_entropy(
            hidden,
            weight,
            labels,
            vocab_size=V,
            chunk=17,
            label_smoothing=0.1,
            z_loss_coeff=0.2,
            softcap=3.0,
            grad_scale=0.6,
        )
        gradients = torch.autograd.grad(out.scaled_sum, [hidden, weight])
        return [out.nll, out.correct, *gradients]

    whole = results()
    monkeypatch.setattr(loss, "CPU_BLOCK_LOGITS", tokens * V)
    for blocks, expected in zip(results(), whole, strict=True):
        assert torch.equal(blocks, expected)


class _NarrowProducts(TorchDispatchMode):
    """Counts 16-bit matrices of a weight's shape: products that are rounded before they are added up."""

    count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.linear.default):
            self.count += result.shape == (V, D)
        return result


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch 2.11 has no such kernel on meta"
)
def test_a_device_adds_up_16_bit_products_in_float32() -> None:
    """On the meta device, where torch has the kernel as on CUDA."""
    hidden, weight, labels = (x.to("meta") for x in inputs(torch.bfloat16))
    with _NarrowProducts() as narrow:
        linear_cross_entropy(
            hidden.requires_grad_(), weight, labels, vocab_size=V, chunk=8
        )
    assert narrow.count == 0


def test_a_sum_of_wide_products_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's kernel: closer to float64 than products that are rounded to 16 bits one by one."""

    def addmm(
        total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor
    ) -> Tensor:
        return out.copy_(total + a.to(out_dtype) @ b.to(out_dtype))

    hidden, weight, labels = inputs(torch.bfloat16)

    def gradient() -> Tensor:
        out = linear_cross_entropy(hidden, weight, labels, vocab_size=V, chunk=2)
        return torch.autograd.grad(out.scaled_sum, weight)[0]

    narrow = gradient()
    for module in (products, loss_gradients):
        monkeypatch.setattr(module, "adds_wide_products", lambda *_: True)
    monkeypatch.setattr(torch, "addmm", addmm)
    wide = gradient()
    expected, *_ = reference(hidden.double(), weight.double(), labels)
    exact = torch.autograd.grad(expected, weight)[0].double()
    assert (wide.double() - exact).norm() < (narrow.double() - exact).norm()
