"""Matrix products by the fastest kernel that torch ships for them.

On the CPU torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on
processors that are not Intel's. torch also ships oneDNN, which uses it on all of them,
but calls it for float32 only in models compiled for inference. Here it is called for
training and generation where it is faster: by a factor of 2.2 on an AMD processor with
AVX-512. On one with AVX2 only, MKL is faster: by a factor of 1.7 for the gradients of
weights (docs/performance.md).

Shapes: T rows, I input features, O output features.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows for which MKL is 1.1 to 1.7 times as fast with the weight as its left operand.
FEW_ROWS = range(5, 33)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias [T, O] for x [T, I] and weight [O, I]."""
    out: Tensor
    if uses_onednn(x, weight):
        out = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    has_few_rows = x.is_cpu and len(x) in FEW_ROWS
    if not has_few_rows or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    # Decoding a few sequences at a time: weight x^T is the transposed result, and the
    # copy back costs less than MKL gains.
    transposed = weight @ x.T  # [O, T]
    out = transposed.T.contiguous()
    if bias is not None:
        out.add_(bias)
    return out


def matmul_nt(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: Tensor | None = None,
) -> Tensor:
    """Return a b^T [M, N] for a [M, K] and b [N, K], plus a bias [N] or a matrix [M, N]. Not differentiable.

    A transposed view costs nothing as ``b``; oneDNN copies one that is passed as ``a``.
    """
    if uses_onednn(a, b):
        return _onednn_matmul_nt(a, b, bias, accumulate)
    if accumulate is not None:
        return torch.addmm(accumulate, a, b.T)
    return F.linear(a, b, bias)


def _onednn_matmul_nt(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    accumulate: Tensor | None,
) -> Tensor:
    # oneDNN adds the matrix in the same pass: "none" and "add" name what follows the
    # product.
    out: Tensor
    if accumulate is None:
        out = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    else:
        out = torch.ops.mkldnn._linear_pointwise.binary(a, accumulate, b, bias, "add")
    return out


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to ``total`` [M, N], for a [M, K] and b [K, N] of the same or a narrower dtype. Not differentiable.

    Of 16-bit matrices CUDA adds up the product in float32 in one pass. Otherwise it is
    rounded to 16 bits, written, and read again to be added.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif adds_wide_products(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@cache
def adds_wide_products(
    device: torch.device, dtype: torch.dtype, wide: torch.dtype
) -> bool:
    """Return whether torch adds a product of ``dtype`` to a matrix of ``wide`` there, by trying it once."""
    if device.type == "cpu":
        return False
    total = torch.zeros(16, 16, dtype=wide, device=device)
    factor = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=wide, out=total)
    except (NotImplementedError, RuntimeError, TypeError):
        return False  # no such kernel: an older torch, or another kind of device
    return True


def uses_onednn(a: Tensor, b: Tensor) -> bool:
    """Return whether oneDNN computes the product of these matrices. Compiled code chooses its own kernels."""
    return (
        not torch.compiler.is_compiling()  # first: tracing the rest would break a compiled graph
        and a.dtype == b.dtype == torch.float32
        and a.is_cpu
        and a.dim() == 2
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


@cache
def onednn_is_faster() -> bool:
    """Return True on AMD and Hygon processors with AVX-512. A rule, not a measurement: runs must repeat to the bit."""
    mkldnn = torch.backends.mkldnn
    if not mkldnn.is_available() or not hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    capabilities: dict[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # not in torch 2.11
    processor = str(capabilities.get("cpu_name", ""))
    return processor.startswith(("AMD", "Hygon")) and bool(capabilities.get("avx512_f"))


class _OneDnnLinear(torch.autograd.Function):
    """Linear layer whose three products oneDNN computes.

        forward   y  = x w^T + b                [T, O]
        dgrad     dx = dy w                     [T, I]
        wgrad     dw = dy^T x                   [O, I]
        bgrad     db = sum over T of dy         [O]

    Each product is written as a b^T, the form that ``matmul_nt`` computes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight, bias=bias)

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = grads[0]
        dx = None
        dw = None
        db = None
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        if needs_dx:
            dx = matmul_nt(dy, weight.T)
        if needs_dw:
            dw = matmul_nt(dy.T, x.T)
        if needs_db:
            db = dy.sum(0)
        return dx, dw, db
