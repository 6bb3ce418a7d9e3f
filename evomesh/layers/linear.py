"""Matrix products whose weights may be cut over the tensor axis.

Shapes: T packed tokens, I input features, O output features.

A column-cut weight holds a range of output features and leaves its output cut along features; a row-cut weight holds
a range of input features and its output is a sum over the axis. With an axis of size 1 both are plain products.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from evomesh.layers.placement import Placement
from evomesh.parallel.spec import ShardSpec


class ColumnLinear(nn.Module):
    """[T, I] -> [T, O / tp]: weight rows (output features) are cut, and the bias with them."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, at: Placement) -> None:
        super().__init__()
        self.at = at
        shape, storage = (out_features, in_features), ((at.mode.storage, 0),)
        rows = out_features // at.cut
        self.weight = at.parameter((rows, in_features), ShardSpec(shape, storage))
        self.bias = at.parameter((rows,), ShardSpec(shape[:1], storage)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return column_products(x, self)[0]


def column_products(x: Tensor, *layers: ColumnLinear) -> tuple[Tensor, ...]:
    """Products of one input with several column-cut weights, so that a cut input is gathered once for all of them."""
    return tuple(F.linear(x, layer.weight, layer.bias) for layer in layers)


class RowLinear(nn.Module):
    """[T, I / tp] -> [T, O]: weight columns (input features) are cut, the outputs of all ranks add up.

    The bias is whole on every rank and is added once, after the sum.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, at: Placement) -> None:
        super().__init__()
        self.at = at
        shape, storage = (out_features, in_features), at.mode.storage
        # Weight sharding (wp) cuts every parameter on dim 0; tensor parallelism cuts the summed dimension.
        spec = ShardSpec(shape, ((storage, 1 if storage == "tp" else 0),))
        self.weight = at.parameter((out_features, in_features // at.cut), spec)
        self.bias = None
        if bias:
            bias_spec = ShardSpec(shape[:1], () if storage == "tp" else ((storage, 0),), at.partial)
            self.bias = at.parameter((out_features,), bias_spec)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
