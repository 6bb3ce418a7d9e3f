"""Matrix products by the fastest kernel that torch carries for them.

On the CPU torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on processors that are not Intel's.
torch also carries oneDNN, which uses it on all of them, but calls it for float32 only in models compiled for inference.
Here it is called for training and generation where it is the faster one: 2.2 times as fast on an AMD processor with
AVX-512. On one that ends at AVX2 MKL is, for the gradients of weights 1.7 times as fast (docs/performance.md).

Shapes: T rows, I input features, O output features.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = range(5, 33)  # rows for which MKL is 1.1 to 1.7 times as fast with the weight as its left matrix


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, I], weight [O, I] -> x weight^T + bias, [T, O]."""
    if uses_onednn(x, weight):
        out: Tensor = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    if torch.is_grad_enabled() or not x.is_cpu or len(x) not in FEW_ROWS:
        return F.linear(x, weight, bias)
    out = (weight @ x.T).T.contiguous()
    return out if bias is None else out.add_(bias)


def matmul_nt(a: Tensor, b: Tensor, *, bias: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """a [M, K] times the transpose of b [N, K], plus a bias [N] or a matrix [M, N]; [M, N]. Not differentiable.

    A transposed view costs nothing as ``b``; as ``a`` oneDNN copies it first.
    """
    out: Tensor
    if not uses_onednn(a, b):
        out = F.linear(a, b, bias) if plus is None else torch.addmm(plus, a, b.T)
    elif plus is None:
        out = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    else:
        out = torch.ops.mkldnn._linear_pointwise.binary(a, plus, b, bias, "add")
    return out


def uses_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether the product of these matrices goes to oneDNN. Compiled code makes its own choice of kernels."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler that looked at the rest would break its graph there
        and a.dtype == b.dtype == torch.float32
        and a.is_cpu
        and a.dim() == 2
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


@cache
def onednn_is_faster() -> bool:
    """On AMD's processors with AVX-512, and Hygon's. A rule, and no measurement: runs must repeat to the bit."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    maker = str(capabilities.get("cpu_name", ""))
    return maker.startswith(("AMD", "Hygon")) and bool(capabilities.get("avx512_f"))


class _OneDnnLinear(torch.autograd.Function):
    """y = x W^T + b;  dx = g W;  dW = g^T x;  db = sum of g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight, bias=bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad, (for_x, for_weight, for_bias) = grads[0], ctx.needs_input_grad
        return (
            matmul_nt(grad, weight.T) if for_x else None,
            matmul_nt(grad.T, x.T) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )
