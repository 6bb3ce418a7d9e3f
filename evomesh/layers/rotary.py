"""Rotary position embedding (Su et al., 2021), its two pairings and dynamic NTK scaling.

Shapes: T packed tokens, G key/value heads, R query heads per key/value head, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomesh.layers.dtype import promote
from evomesh.layers.sequence_bounds import SequenceBounds


@dataclass(frozen=True)
class RotaryEmbedding:
    """Angles of the rotation: position * base^(-2i/H) for pair i.

    Attributes:
        head_dim: H, even.
        base: ``rope_base``.
        dynamic_ntk: for a document longer than ``max_position`` M, of length L, use
            base * (factor * L / M - (factor - 1))^(H / (H - 2)). The length is the document's own, so that a document
            means the same alone and packed with others, on every layout.
        factor: ``rope_scaling_factor``.
    """

    head_dim: int
    base: float
    dynamic_ntk: bool = False
    max_position: int = 2048
    factor: float = 1.0

    def tables(self, bounds: SequenceBounds, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of one packed sequence, each [T, H/2] in at least float32."""
        positions = bounds.position_ids.to(torch.float64)
        exponent = (
            torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device) / self.head_dim
        )
        base = torch.full((1,), self.base, dtype=torch.float64, device=positions.device)
        if self.dynamic_ntk:
            length = bounds.span().to(torch.float64).clamp(min=self.max_position)
            stretch = self.factor * length / self.max_position - (self.factor - 1)
            stretch = torch.where(length > self.max_position, stretch, 1.0)
            base = base * stretch ** (self.head_dim / (self.head_dim - 2))
        angles = positions[:, None] * base[:, None] ** -exponent
        return angles.cos().to(promote(dtype)), angles.sin().to(promote(dtype))


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the two members of every rotated pair: neighbouring columns, or first and second half."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, interleaved: bool) -> None:
    """out = x rotated by the angle; ``x`` and ``out`` [T, G, heads, H], tables [T, 1, 1, H/2]."""
    a, b = _pairs(x, interleaved)
    out_a, out_b = _pairs(out, interleaved)
    out_a.copy_(torch.addcmul(a * cos, b, sin, value=-1))
    out_b.copy_(torch.addcmul(b * cos, a, sin))


class _SplitRotate(torch.autograd.Function):
    """One pass forward and one backward, where slicing and concatenating would take a pass for each part."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, head_dim: int, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = cos[:, None, None], sin[:, None, None]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        heads = qkv.view(qkv.shape[0], kv_heads, -1, head_dim)  # [T, G, R + 2, H]
        q, k = torch.empty_like(heads[:, :, :-2]), torch.empty_like(heads[:, :, -2:-1])
        _rotate(heads[:, :, :-2], cos, sin, q, interleaved)
        _rotate(heads[:, :, -2:-1], cos, sin, k, interleaved)
        return q.flatten(1, 2), k.squeeze(2), heads[:, :, -1].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad_q, grad_k, grad_v = grads
        tokens, kv_heads, head_dim = grad_k.shape
        grad_q = grad_q.reshape(tokens, kv_heads, -1, head_dim)
        grad = grad_q.new_empty(tokens, kv_heads, grad_q.shape[2] + 2, head_dim)
        _rotate(grad_q, cos, -sin, grad[:, :, :-2], ctx.interleaved)
        _rotate(grad_k.unsqueeze(2), cos, -sin, grad[:, :, -2:-1], ctx.interleaved)
        grad[:, :, -1] = grad_v
        return grad.view(tokens, -1), None, None, None, None, None


def split_and_rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, kv_heads: int, head_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts a fused projection [T, G (R + 2) H] into q [T, G R, H], k and v [T, G, H]; rotates q and k.

    ``qkv`` is group-major: for each key/value head its R query heads, the key head, the value head.
    """
    if qkv.is_cpu and not torch.is_grad_enabled():  # q and k in one pass, v as it lies
        heads = qkv.view(qkv.shape[0], kv_heads, -1, head_dim)
        rotated = torch.empty_like(heads[:, :, :-1])
        _rotate(heads[:, :, :-1], cos[:, None, None], sin[:, None, None], rotated, interleaved)
        return rotated[:, :, :-1].flatten(1, 2), rotated[:, :, -1], heads[:, :, -1]
    q, k, v = _SplitRotate.apply(qkv, cos, sin, kv_heads, head_dim, interleaved)  # type: ignore[no-untyped-call]
    return q, k, v
