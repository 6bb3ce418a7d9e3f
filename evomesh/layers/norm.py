"""RMSNorm (Zhang and Sennrich, 2019) and LayerNorm over the model dimension, computed in at least float32.

Shapes: T packed tokens, D model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomesh.layers.dtype import promote
from evomesh.layers.placement import Placement
from evomesh.parallel.collectives import all_reduce, copy_to_axis
from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import ShardSpec


class _RmsNorm(torch.autograd.Function):
    """RMSNorm for the CPU, where torch's own takes many passes; it keeps only x and r.

        forward    r  = 1 / sqrt(mean(x^2) + eps)           [T, 1]
                   n  = x r                                 [T, D]
                   y  = w n                                 [T, D]
        backward   dn = w dy                                [T, D]
                   dx = r (dn - n mean(dn n))               [T, D]
                   dw = sum over T of dy n                  [D]

    r depends on x: dx loses the part of dn along n, since a longer x has the same n.
    Not for compiled blocks: see _SwiGlu.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # One tensor [T, 1], overwritten until it is r.
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1])
        scale.add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        out: Tensor = x * scale
        return out.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        dy = grads[0]
        size = x.shape[-1]
        normed = x * scale
        dy_normed = dy * normed
        dw = dy_normed.sum(0)

        # A product with the weight sums over D: mean(dn n) = (dy n) w / D, [T].
        mean = dy_normed @ weight
        mean.div_(size)
        mean_column = mean.unsqueeze(-1)  # [T, 1]
        dn = dy * weight
        dx = dn.addcmul_(normed, mean_column, value=-1)
        dx.mul_(scale)
        return dx, dw, None


class Norm(nn.Module):
    """[T, D] -> [T, D] in the model's dtype, whatever the dtype of the input.

    Args:
        kind: "rmsnorm" (y = w x / sqrt(mean(x^2) + eps)) or "layernorm" (with weight and bias).
        fp32_weight: keep the parameters in at least float32 (``use_fp32_norm``).
        of_heads: the input is some of the heads, on each rank of the tensor axis others (``qk_norm``).
        offset: multiply by 1 + w, so that weights are deviations from 1 (``add_unit_offset``).
        sharded: tensor parallelism shards the columns of the input and the weight, [T, D / tp]; for rmsnorm.
    """

    def __init__(
        self,
        kind: str,
        size: int,
        *,
        eps: float,
        fp32_weight: bool,
        placement: Placement,
        of_heads: bool = False,
        offset: bool = False,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self.offset = offset
        self.size = size
        self.eps = eps
        self.placement = placement
        splits_columns = sharded and placement.mode.weight_axis == "tp"
        self.columns_axis = placement.axis if splits_columns else Axis("tp")
        dtype = promote(placement.dtype) if fp32_weight else placement.dtype
        is_wider = dtype != placement.dtype
        spec = self._spec(of_heads, sharded, is_wider)
        local_size = size // self.columns_axis.size
        self.weight = placement.make_parameter((local_size,), spec, dtype)
        self.bias = None
        if kind == "layernorm":
            self.bias = placement.make_parameter((size,), spec, dtype)

    def _spec(self, of_heads: bool, sharded: bool, is_wider: bool) -> ShardSpec:
        if self.placement.mode.weight_axis == "wp":
            return self._spec_under_isp(is_wider)
        shape = (self.size,)
        if sharded:
            return ShardSpec(shape, (("tp", 0),))
        # Ranks with other heads have other summands of the gradient, also where all of
        # them see the whole sequence.
        partial = self.placement.partial
        if of_heads:
            partial = frozenset({"tp"})
        return ShardSpec(shape, partial=partial)

    def _spec_under_isp(self, is_wider: bool) -> ShardSpec:
        shape = (self.size,)
        if is_wider:
            # With a dtype other than its block's it would be gathered separately, 16 KiB
            # that take as long as megabytes. It stays whole, and its gradient is summed
            # like that of the last norm.
            of_last_norm = self.placement.on_tensor_axis()
            partial = of_last_norm.partial
            return ShardSpec(shape, partial=partial)
        # Weight sharding shards it like every parameter of a block.
        shards = (("wp", 0),)
        partial = self.placement.partial
        return ShardSpec(shape, shards, partial)

    def _scale_of_columns(self, x_shard: Tensor) -> Tensor:
        """Return 1 / sqrt(mean(x^2) + eps) of whole rows, [T, 1], where each rank has some of the columns.

        The sum of the squares is ``P -> I``, and each rank multiplies other columns by
        what follows from it: ``I -> R``.
        """
        local_sum = x_shard.square().sum(dim=-1, keepdim=True)
        total = all_reduce(local_sum, self.columns_axis)
        total = copy_to_axis(total, self.columns_axis)
        return (total / self.size + self.eps).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        wide = promote(self.placement.dtype)
        wide_x = x.to(wide)
        weight = self.weight.to(wide)
        if self.offset:
            # In the wide dtype: bfloat16 has steps of 1/128 near 1, and finer ones near 0.
            weight = weight + 1
        out = self._normed(wide_x, weight)
        return out.to(self.placement.dtype)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the norm of ``x`` by the fastest way there is for it; both are in the wide dtype."""
        if self.columns_axis.size > 1:
            return self._rms_norm_of_columns(x, weight)
        if self.bias is not None:
            bias = self.bias.to(x.dtype)
            return F.layer_norm(x, (self.size,), weight, bias, self.eps)
        return self._rms_norm(x, weight)

    def _rms_norm_of_columns(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = self._scale_of_columns(x)
        return x * scale * weight

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        # torch's norm is one kernel on CUDA, and many passes on the CPU.
        if x.is_cuda or torch.compiler.is_compiling():
            return F.rms_norm(x, (self.size,), weight, self.eps)
        out: Tensor
        out = _RmsNorm.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
        return out
