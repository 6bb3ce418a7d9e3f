"""Feed-forward networks: SwiGLU (Shazeer, 2020) and GELU.

Shapes: T packed tokens, D model, F mlp hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomesh.config.model import GateActivation
from evomesh.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel_linears,
)
from evomesh.layers.placement import Placement


class _SwiGlu(torch.autograd.Function):
    """y = silu(gate) up. Keeps only its two inputs and recomputes silu(gate) in backward: a third less memory.

    Not for compiled blocks: the compiler chooses what to keep, and torch 2.11's
    computes wrong gradients for a function whose forward writes in place (pytorch issue
    180642).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return grad_gate, F.silu(gate).mul_(grads[0])


class _GeGlu(torch.autograd.Function):
    """y = gelu(gate) up, with the tanh approximation of GELU; like _SwiGlu."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.gelu_backward(
            grads[0] * up, gate, approximate="tanh"
        )
        return grad_gate, F.gelu(gate, approximate="tanh").mul_(grads[0])


def _gated(gate: Tensor, up: Tensor, activation: GateActivation) -> Tensor:
    """Return activation(gate) up."""
    out: Tensor
    if activation == "gelu_tanh":
        if torch.compiler.is_compiling():
            return F.gelu(gate, approximate="tanh") * up
        out = _GeGlu.apply(gate, up)  # type: ignore[no-untyped-call]
        return out
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    out = _SwiGlu.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


class FeedForward(nn.Module):
    """[T, D] -> [T, D]: w2(silu(w1 x) * w3 x), or w2(gelu(w1 x)) with the tanh approximation.

    Args:
        width: F.
        swiglu: False for the GELU network, which has no ``w3``.
        bias: biases of all of its projections (``mlp_bias``).
        activation: of the gate (``gate_activation``).
    """

    def __init__(
        self,
        size: int,
        width: int,
        *,
        swiglu: bool,
        placement: Placement,
        bias: bool = False,
        activation: GateActivation = "silu",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.swiglu = swiglu
        self.w1 = ColumnParallelLinear(size, width, bias=bias, placement=placement)
        if swiglu:
            self.w3 = ColumnParallelLinear(size, width, bias=bias, placement=placement)
        self.w2 = RowParallelLinear(width, size, bias=bias, placement=placement)

    def forward(self, x: Tensor) -> Tensor:
        if self.swiglu:
            gate, up = column_parallel_linears(x, self.w1, self.w3)
            hidden = _gated(gate, up, self.activation)
        else:
            up = self.w1(x)
            hidden = F.gelu(up, approximate="tanh")
        out: Tensor = self.w2(hidden)
        return out
