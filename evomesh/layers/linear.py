"""Matrix products whose weights may be cut over the tensor axis.

Shapes: T packed tokens, S = T / tp, I input features, O output features.

A column-cut weight holds a range of output features and leaves its output cut along features; a row-cut weight holds
a range of input features and its output is a sum over the axis. With an axis of size 1 both are plain products, and
in isp too, where weight sharding has put each weight together before it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evomesh.layers.placement import Placement
from evomesh.layers.products import linear, matmul_nt
from evomesh.parallel.collectives import (
    all_gather,
    all_gather_no_grad,
    all_reduce,
    copy_to_axis,
    reduce_scatter,
    reduce_scatter_no_grad,
)
from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import ShardSpec


class ColumnParallelLinear(nn.Module):
    """[T, I] (mtp) or [S, I] (msp, fsp) -> [T, O / tp]: weight rows (output features) are cut, the bias with them."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        shape, storage = (out_features, in_features), ((placement.mode.weight_axis, 0),)
        rows = out_features // placement.weight_shards
        self.weight = placement.make_parameter((rows, in_features), ShardSpec(shape, storage))
        self.bias = placement.make_parameter((rows,), ShardSpec(shape[:1], storage)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel_linears(x, self)[0]


def column_parallel_linears(x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
    """Products of one input with several column-cut weights, so that it is gathered once for all of them.

    mtp ``I -> S(1)``, msp and fsp ``S(0) -> S(1)``; backward the dual. msp keeps the gathered input for backward, fsp
    its own part, and gathers it again.
    """
    axis, mode = layers[0].placement.axis, layers[0].placement.mode
    if axis.size > 1 and mode.weight_axis == "tp":
        if mode.regather_input:
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            outs: tuple[Tensor, ...] = _RegatherLinear.apply(x, axis, *weights, *biases)  # type: ignore[no-untyped-call]
            return outs
        x = all_gather(x, axis) if mode.sequence_parallel else copy_to_axis(x, axis)
    return tuple(linear(x, layer.weight, layer.bias) for layer in layers)


class _RegatherLinear(torch.autograd.Function):
    """For local x [S, I], each w [O / tp, I], b [O / tp] or None:

    X = all_gather(x);  y = X w^T + b;  dgrad = reduce_scatter(sum of g w);  wgrad = g^T all_gather(x);  bgrad = sum g
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.save_for_backward(x, *weights)
        ctx.axis, ctx.biased = axis, [bias is not None for bias in biases]
        whole = all_gather_no_grad(x, axis)
        return tuple(
            matmul_nt(whole, w, bias=b) for w, b in zip(weights, biases, strict=True) if w is not None
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        whole = all_gather_no_grad(x, ctx.axis)
        grad = matmul_nt(grads[0], weights[0].T)
        for g, w in zip(grads[1:], weights[1:], strict=True):
            grad = matmul_nt(g, w.T, plus=grad)
        bias_grads = [g.sum(0) if biased else None for g, biased in zip(grads, ctx.biased, strict=True)]
        return (
            reduce_scatter_no_grad(grad, ctx.axis),
            None,
            *(matmul_nt(g.T, whole.T) for g in grads),
            *bias_grads,
        )


class RowParallelLinear(nn.Module):
    """[T, I / tp] -> [T, O] (mtp) or [S, O]: weight columns (input features) are cut, all ranks' outputs add up.

    The bias is whole on every rank and is added once, after the sum.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        shape, storage = (out_features, in_features), placement.mode.weight_axis
        # Weight sharding (wp) cuts every parameter on dim 0; tensor parallelism cuts the summed dimension.
        spec = ShardSpec(shape, ((storage, 1 if storage == "tp" else 0),))
        self.weight = placement.make_parameter((out_features, in_features // placement.weight_shards), spec)
        self.bias = None
        if bias:
            bias_spec = ShardSpec(shape[:1], () if storage == "tp" else ((storage, 0),), placement.partial)
            self.bias = placement.make_parameter((out_features,), bias_spec)

    def forward(self, x: Tensor) -> Tensor:
        axis, mode = self.placement.axis, self.placement.mode
        if axis.size == 1 or mode.weight_axis == "wp":
            return linear(x, self.weight, self.bias)
        part = linear(x, self.weight)
        out = reduce_scatter(part, axis) if mode.sequence_parallel else all_reduce(part, axis)
        return out if self.bias is None else out + self.bias
