"""Token embedding and the scaling of its gradient.

Shapes: T packed tokens, D model, V vocabulary (padded to a multiple of the tensor axis).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evomesh.layers.dtype import promote
from evomesh.layers.placement import Placement
from evomesh.parallel.collectives import (
    all_reduce,
    all_to_all,
    gather_from_axis,
    reduce_scatter,
)
from evomesh.parallel.spec import ShardSpec


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by ``scale``: a x + (1 - a) stop_gradient(x) without its rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return ``x`` with its gradient multiplied by ``scale``."""
    if scale == 1.0:
        return x
    out: Tensor = ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return out


class _Lookup(torch.autograd.Function):
    """Row lookup, weight[ids]; backward adds up rows in at least float32, in an order that is the same in every run."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return weight.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, sum_rows(grads[0].to(promote(ctx.dtype)), ids, ctx.rows).to(
            ctx.dtype
        )


def sum_rows(values: Tensor, ids: Tensor, rows: int) -> Tensor:
    """Add row t of ``values`` [T, D] to row ``ids[t]`` of zeros [rows, D], in an order that ``ids`` alone decide."""
    if not ids.is_cpu:
        # index_add_ on CUDA adds with atomics, in whatever order threads arrive. This
        # one sorts the ids first.
        total: Tensor = torch.ops.aten.embedding_dense_backward(
            values, ids, rows, -1, False
        )
        return total
    # One thread, in token order.
    return values.new_zeros(rows, values.shape[1]).index_add_(0, ids, values)


class Embedding(nn.Module):
    """[T] int64 -> [T, D] (mtp) or [T / tp, D]. Rows (the vocabulary) are sharded, or columns with ``split_hidden``.

    Args:
        rows: V.
        grad_scale: factor on the gradient that reaches the weight (``embed_grad_scale``).
        scale: factor on the rows that are looked up, rounded to the dtype of the weight (``scale_embeddings``).
    """

    def __init__(
        self,
        rows: int,
        hidden_size: int,
        *,
        grad_scale: float,
        split_hidden: bool,
        placement: Placement,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        # Rounded as the published weights were trained: sqrt(3072) is 55.5 in bfloat16.
        self.scale = torch.tensor(scale, dtype=placement.dtype).item()
        self.placement = placement
        self.grad_scale = grad_scale
        self.split_hidden = split_hidden
        shard_dim = 1 if split_hidden else 0
        shards = ((placement.mode.weight_axis, shard_dim),)
        local_shape = [rows, hidden_size]
        local_shape[shard_dim] //= placement.weight_shards
        self.weight = placement.make_parameter(
            tuple(local_shape), ShardSpec((rows, hidden_size), shards)
        )

    def forward(self, ids: Tensor) -> Tensor:
        if self.placement.axis.size == 1:
            out = self._look_up(ids)
        elif self.split_hidden:
            out = self._from_columns(ids)
        else:
            out = self._from_rows(ids)
        if self.scale != 1.0:
            out = out * self.scale
        return scale_gradient(out, self.grad_scale)

    def _from_columns(self, ids: Tensor) -> Tensor:
        """Look up this rank's columns of every row; ``S(1)@tp -> I@tp`` (mtp) or ``S(1)@tp -> S(0)@tp``."""
        axis = self.placement.axis
        columns = self._look_up(ids)
        if self.placement.mode.sequence_parallel:
            return all_to_all(columns, axis, split_dim=0, concat_dim=1)
        return gather_from_axis(columns, axis, dim=1)

    def _from_rows(self, ids: Tensor) -> Tensor:
        """Look up the rows that this rank holds, zeros for others: ``P@tp -> I@tp`` (mtp) or ``P@tp -> S(0)@tp``."""
        axis = self.placement.axis
        rows = self.weight.shape[0]
        first_row = axis.rank * rows
        local_ids = ids - first_row
        is_elsewhere = (local_ids < 0) | (local_ids >= rows)
        # Rows of other ranks: look up row 0, then set what was found to zero.
        local_ids = local_ids.masked_fill(is_elsewhere, 0)
        found = self._look_up(local_ids)
        is_elsewhere = is_elsewhere.unsqueeze(1)  # [T, 1], for all columns
        summand = found.masked_fill(is_elsewhere, 0.0)
        if self.placement.mode.sequence_parallel:
            return reduce_scatter(summand, axis)
        return all_reduce(summand, axis)

    def _look_up(self, rows: Tensor) -> Tensor:
        out: Tensor = _Lookup.apply(rows, self.weight)  # type: ignore[no-untyped-call]
        return out
