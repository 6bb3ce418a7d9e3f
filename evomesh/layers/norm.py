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
    """y = w n, n = x r, r = 1 / sqrt(mean(x^2) + eps);  dx = r (w dy - n mean(w dy n)),  dw = sum over T of dy n.

    For the CPU, where torch's own takes many passes; it keeps only x and r. Not for
    compiled blocks: see _SwiGlu.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # [T, 1]; from here on in place.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean_square = norm.square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        out: Tensor = (x * scale).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        dy = grads[0]
        normed = x * scale  # n
        dy_normed = dy * normed
        mean = (dy_normed @ weight).div_(x.shape[-1])  # mean(w dy n), [T]
        dn = dy * weight
        dx = dn.addcmul_(normed, mean.unsqueeze(-1), value=-1).mul_(scale)
        dw = dy_normed.sum(0)
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
        self.size, self.eps, self.placement = size, eps, placement
        splits_columns = sharded and placement.mode.weight_axis == "tp"
        self.columns_axis = placement.axis if splits_columns else Axis("tp")
        spec = self._spec(of_heads, sharded)
        local_size = size // self.columns_axis.size
        dtype = promote(placement.dtype) if fp32_weight else placement.dtype
        self.weight = placement.make_parameter((local_size,), spec, dtype)
        self.bias = None
        if kind == "layernorm":
            self.bias = placement.make_parameter((size,), spec, dtype)

    def _spec(self, of_heads: bool, sharded: bool) -> ShardSpec:
        if self.placement.mode.weight_axis == "wp":
            # Weight sharding shards it like every parameter of a block.
            return ShardSpec((self.size,), (("wp", 0),), self.placement.partial)
        if sharded:
            return ShardSpec((self.size,), (("tp", 0),))
        # Ranks with other heads have other summands of the gradient, also where all of
        # them see the whole sequence.
        partial = frozenset({"tp"}) if of_heads else self.placement.partial
        return ShardSpec((self.size,), (), partial)

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
        out: Tensor
        if self.columns_axis.size > 1:
            out = wide_x * self._scale_of_columns(wide_x) * weight
        elif self.bias is not None:
            out = F.layer_norm(
                wide_x, (self.size,), weight, self.bias.to(wide), self.eps
            )
        elif x.is_cuda or torch.compiler.is_compiling():
            out = F.rms_norm(wide_x, (self.size,), weight, self.eps)
        else:
            out = _RmsNorm.apply(wide_x, weight, self.eps)  # type: ignore[no-untyped-call]
        return out.to(self.placement.dtype)
