"""Linear layers whose weights may be sharded over the tensor axis.

Shapes: T packed tokens, S = T / tp, I input features, O output features.

A column-parallel weight holds a range of output features, and its output is sharded
along features. A row-parallel weight holds a range of input features, and its output is
a partial sum over the axis:

    mtp        x [T, I]    copy_to_axis    -> column -> [T, O / tp] -> row -> all-reduce      -> [T, O]
    msp, fsp   x [S, I]    all-gather      -> column -> [T, O / tp] -> row -> reduce-scatter  -> [S, O]
    isp        x [S, I]                       column -> [S, O]      -> row                    -> [S, O]

With an axis of size 1 both are plain products, and in isp too, where weight sharding
has gathered each weight before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.layers.placement import Placement
from evomesh.layers.products import linear, matmul_nt
from evomesh.parallel.collectives import (
    all_gather_no_grad,
    all_reduce,
    reduce_scatter,
    reduce_scatter_no_grad,
)
from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import ShardSpec


class ColumnParallelLinear(nn.Module):
    """[T, I] (mtp) or [S, I] (msp, fsp) -> [T, O / tp]: output features, weight rows and bias, are sharded."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, placement: Placement
    ) -> None:
        super().__init__()
        self.placement = placement
        shards = ((placement.mode.weight_axis, 0),)
        local_rows = out_features // placement.weight_shards
        weight_spec = ShardSpec((out_features, in_features), shards)
        local_shape = (local_rows, in_features)
        self.weight = placement.make_parameter(local_shape, weight_spec)
        self.bias = None
        if bias:
            bias_spec = ShardSpec((out_features,), shards)
            self.bias = placement.make_parameter((local_rows,), bias_spec)

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel_linears(x, self)[0]


def column_parallel_linears(
    x: Tensor, *layers: ColumnParallelLinear
) -> tuple[Tensor, ...]:
    """Apply several column-parallel layers to one input, which is gathered once for all of them.

    mtp ``I@tp -> S(1)@tp; backward S(1)@tp -> I@tp``, msp and fsp ``S(0)@tp -> S(1)@tp; backward S(1)@tp -> S(0)@tp``.
    msp keeps the gathered input for backward, fsp its own shard of it, and gathers it again.
    """
    placement = layers[0].placement
    mode = placement.mode
    axis = placement.axis
    tensor_parallel = axis.size > 1 and mode.weight_axis == "tp"
    if tensor_parallel and mode.regather_input:
        weights = [layer.weight for layer in layers]
        biases = [layer.bias for layer in layers]
        regathered: tuple[Tensor, ...] = _RegatherLinear.apply(
            x, axis, *weights, *biases
        )  # type: ignore[no-untyped-call]
        return regathered
    if tensor_parallel:
        x = placement.gather_sequence(x)
    outs = []
    for layer in layers:
        out = linear(x, layer.weight, layer.bias)
        outs.append(out)
    return tuple(outs)


class _RegatherLinear(torch.autograd.Function):
    """Column-parallel products of one gathered input, which backward gathers again (fsp).

    Local shapes, for each of the layers: x_shard [S, I], w_shard [O / tp, I], b_shard
    [O / tp] or None.

        forward   x        = all_gather(x_shard)                       [T, I]
                  y_shard  = x w_shard^T + b_shard                     [T, O / tp]
        dgrad     dx       = sum over layers of dy_shard w_shard       [T, I], a partial sum over tp
                  dx_shard = reduce_scatter(dx)                        [S, I]
        wgrad     x        = all_gather(x_shard)                       [T, I], again
                  dw_shard = dy_shard^T x                              [O / tp, I]
        bgrad     db_shard = sum over T of dy_shard                    [O / tp]

    Every rank uses all of x with its own output features, so each has one summand of
    dx: the dual of the all-gather is a reduce-scatter. Only x_shard is kept: 1/tp of
    the memory of x, for one more all-gather. Weight and bias gradients need no
    communication, because every rank has all T rows of x and of its dy_shard.
    """

    @staticmethod
    def forward(
        ctx: Any, x_shard: Tensor, axis: Axis, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        w_shards = parameters[:count]
        b_shards = parameters[count:]
        ctx.save_for_backward(x_shard, *w_shards)
        ctx.axis = axis
        ctx.has_bias = [bias is not None for bias in b_shards]
        x = all_gather_no_grad(x_shard, axis)
        return tuple(
            matmul_nt(x, w_shard, bias=b_shard)
            for w_shard, b_shard in zip(w_shards, b_shards, strict=True)
            if w_shard is not None
        )

    @staticmethod
    def backward(ctx: Any, *dy_shards: Tensor) -> tuple[Tensor | None, ...]:
        x_shard, *w_shards = ctx.saved_tensors
        x = all_gather_no_grad(x_shard, ctx.axis)

        # dgrad: dx is the sum of dy w over all projections.
        dx = _sum_of_products(dy_shards, w_shards)
        dx_shard = reduce_scatter_no_grad(dx, ctx.axis)

        # wgrad: dw = dy^T x is a product a b^T with b = x^T.
        dw_shards = []
        x_transposed = x.T
        for dy_shard in dy_shards:
            dw_shard = matmul_nt(dy_shard.T, x_transposed)
            dw_shards.append(dw_shard)
        db_shards = _bias_gradients(dy_shards, ctx.has_bias)
        return dx_shard, None, *dw_shards, *db_shards


def _sum_of_products(dy_shards: Sequence[Tensor], w_shards: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``dy w``, [T, I]: the first product makes it, each further one is added in place."""
    total = None
    for dy_shard, w_shard in zip(dy_shards, w_shards, strict=True):
        total = matmul_nt(dy_shard, w_shard.T, accumulate=total)
    assert total is not None
    return total


def _bias_gradients(
    dy_shards: Sequence[Tensor], has_bias: Sequence[bool]
) -> list[Tensor | None]:
    """Return db = sum over the tokens of dy for each projection with a bias, None for the others."""
    db_shards: list[Tensor | None] = []
    for dy_shard, exists in zip(dy_shards, has_bias, strict=True):
        db_shard = None
        if exists:
            db_shard = dy_shard.sum(0)
        db_shards.append(db_shard)
    return db_shards


class RowParallelLinear(nn.Module):
    """[T, I / tp] -> [T, O] (mtp) or [S, O]: input features, the weight's columns, are sharded; outputs add up.

        forward   y = all_reduce or reduce_scatter of x_shard w_shard^T    each rank has one summand; then + bias
        dgrad     dx_shard = dy w_shard                                    [T, I / tp], dy replicated or all-gathered
        wgrad     dw_shard = dy^T x_shard                                  [O, I / tp], no communication

    Autograd derives the last two: the collectives know their duals. The bias is
    replicated, and added after the sum.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, placement: Placement
    ) -> None:
        super().__init__()
        self.placement = placement
        weight_axis = placement.mode.weight_axis
        # Weight sharding (wp) shards dim 0 of every parameter; tensor parallelism
        # shards the summed dimension.
        sharded_dim = 0 if weight_axis == "wp" else 1
        weight_shards = ((weight_axis, sharded_dim),)
        weight_spec = ShardSpec((out_features, in_features), weight_shards)
        local_columns = in_features // placement.weight_shards
        local_shape = (out_features, local_columns)
        self.weight = placement.make_parameter(local_shape, weight_spec)
        self.bias = None
        if bias:
            bias_spec = self._bias_spec(out_features)
            self.bias = placement.make_parameter((out_features,), bias_spec)

    def _bias_spec(self, out_features: int) -> ShardSpec:
        shards: tuple[tuple[str, int], ...] = ()
        if self.placement.mode.weight_axis == "wp":
            shards = (("wp", 0),)
        # Tensor parallelism adds the bias to the sum, so that every rank needs all of it.
        return ShardSpec((out_features,), shards, self.placement.partial)

    def forward(self, x_shard: Tensor) -> Tensor:
        axis = self.placement.axis
        mode = self.placement.mode
        if axis.size == 1 or mode.weight_axis == "wp":
            return linear(x_shard, self.weight, self.bias)
        summand = linear(x_shard, self.weight)
        if mode.sequence_parallel:
            out = reduce_scatter(summand, axis)
        else:
            out = all_reduce(summand, axis)
        return out if self.bias is None else out + self.bias
