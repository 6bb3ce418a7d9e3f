"""RMSNorm (Zhang and Sennrich, 2019) and LayerNorm over the model dimension, computed in at least float32.

Shapes: T packed tokens, D model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from evomesh.layers.dtype import promote
from evomesh.layers.placement import Placement
from evomesh.parallel.spec import ShardSpec


class Norm(nn.Module):
    """[T, D] -> [T, D] in the model's dtype, whatever the input's.

    Args:
        kind: "rmsnorm" (y = w x / sqrt(mean(x^2) + eps)) or "layernorm" (with weight and bias).
        fp32_weight: keep the parameters in at least float32 (``use_fp32_norm``).
    """

    def __init__(self, kind: str, size: int, *, eps: float, fp32_weight: bool, at: Placement) -> None:
        super().__init__()
        self.size, self.eps, self.at = size, eps, at
        spec = ShardSpec((size,), ((at.mode.storage, 0),) if at.mode.storage == "wp" else (), at.partial)
        dtype = promote(at.dtype) if fp32_weight else at.dtype
        self.weight = at.parameter((size,), spec, dtype)
        self.bias = at.parameter((size,), spec, dtype) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        wide = promote(self.at.dtype)
        weight = self.weight.to(wide)
        if self.bias is None:
            out = F.rms_norm(x.to(wide), (self.size,), weight, self.eps)
        else:
            out = F.layer_norm(x.to(wide), (self.size,), weight, self.bias.to(wide), self.eps)
        return out.to(self.at.dtype)
