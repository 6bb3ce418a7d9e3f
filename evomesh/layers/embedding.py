"""Token embedding and the scaling of its gradient.

Shapes: T packed tokens, D model, V vocabulary (padded to a multiple of the tensor axis).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evomesh.layers.dtype import promote
from evomesh.layers.placement import Placement
from evomesh.parallel.collectives import all_reduce, all_to_all, gather_from_axis, reduce_scatter
from evomesh.parallel.spec import ShardSpec


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by ``scale``: a x + (1 - a) stop(x) without its rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return x
    out: Tensor = ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return out


class _Lookup(torch.autograd.Function):
    """rows = weight[ids]; backward adds rows up in at least float32, in the order of the tokens on the CPU."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return weight.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        wide = promote(ctx.dtype)
        total = torch.zeros(ctx.rows, grads[0].shape[1], dtype=wide, device=ids.device)
        return None, total.index_add_(0, ids, grads[0].to(wide)).to(ctx.dtype)


class Embedding(nn.Module):
    """[T] int64 -> [T, D] (mtp) or [T / tp, D]. Rows (the vocabulary) are cut, or columns with ``split_hidden``.

    Args:
        rows: V.
        grad_scale: factor on the gradient that reaches the weight (``embed_grad_scale``).
    """

    def __init__(
        self, rows: int, hidden_size: int, *, grad_scale: float, split_hidden: bool, placement: Placement
    ) -> None:
        super().__init__()
        self.placement, self.grad_scale, self.split_hidden = placement, grad_scale, split_hidden
        dim = 1 if split_hidden else 0
        local = [rows, hidden_size]
        local[dim] //= placement.weight_shards
        spec = ShardSpec((rows, hidden_size), ((placement.mode.weight_axis, dim),))
        self.weight = placement.make_parameter((local[0], local[1]), spec)

    def forward(self, ids: Tensor) -> Tensor:
        axis, sequence = self.placement.axis, self.placement.mode.sequence_parallel
        if axis.size == 1:
            out = self._look_up(ids)
        elif self.split_hidden:  # S(1) -> I, or S(1) -> S(0)
            out = self._look_up(ids)
            out = (
                all_to_all(out, axis, split_dim=0, concat_dim=1)
                if sequence
                else gather_from_axis(out, axis, dim=1)
            )
        else:  # P -> I, or P -> S(0): of the summands one is the row, all others are zero
            row = ids - axis.rank * self.weight.shape[0]
            elsewhere = (row < 0) | (row >= self.weight.shape[0])
            out = self._look_up(row.masked_fill(elsewhere, 0)).masked_fill(elsewhere[:, None], 0.0)
            out = reduce_scatter(out, axis) if sequence else all_reduce(out, axis)
        return scale_gradient(out, self.grad_scale)

    def _look_up(self, rows: Tensor) -> Tensor:
        out: Tensor = _Lookup.apply(rows, self.weight)  # type: ignore[no-untyped-call]
        return out
