"""Attention scores: how they are scaled, and the soft cap of Gemma 2, for which torch has no fused kernel.

Shapes: B batch, N query heads, G key/value heads, R = N / G, L queries, S keys, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evomesh.config.schema import ModelConfig
from evomesh.layers.dtype import promote

# Queries of one call with a soft cap, whose scores [B, N, L, S] are in memory.
CAPPED_BLOCK = 256


@dataclass(frozen=True)
class ScoreRule:
    """The scores of queries and keys: scale q k^T, then softcap tanh(scores / softcap).

    Attributes:
        scale: None: 1 / sqrt(H).
        softcap: bound of the scores; None: they are not bounded.
    """

    scale: float | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> ScoreRule:
        scalar = config.query_pre_attn_scalar
        scale = None if scalar is None else scalar**-0.5
        if config.query_multiplier != 1:
            scale = config.query_multiplier * config.head_dim**-0.5
        return cls(scale, config.attn_logit_softcapping)

    def apply(self, products: Tensor, head_dim: int) -> Tensor:
        """Return the scores of products q k^T of vectors with ``head_dim`` elements."""
        scores = products * (self.scale or head_dim**-0.5)
        if self.softcap is None:
            return scores
        return self.softcap * torch.tanh(scores / self.softcap)


PLAIN_SCORES = ScoreRule()


def attend_to_visible(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    rule: ScoreRule = PLAIN_SCORES,
) -> Tensor:
    """Return softmax(scores) v [B, N, L, H] for q [B, N, L, H], k and v [B, G, S, H].

    Args:
        visible: bool, which keys a query sees: [L, S], or [B, 1, 1, S]; None: all.
    """
    if rule.softcap is not None:
        scale = rule.scale or q.shape[3] ** -0.5
        out: Tensor = _CappedAttention.apply(q, k, v, visible, scale, rule.softcap)  # type: ignore[no-untyped-call]
        return out
    return attend_in_groups(q, k, v, visible=visible, scale=rule.scale)


def attend_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return torch's attention [B, N, L, H] for q [B, N, L, H], k and v [B, G, S, H]."""
    copies = q.shape[1] // k.shape[1]
    if copies > 1 and not q.is_cpu and q.dtype == torch.float32:
        # Of torch's kernels for CUDA, the one that takes float32 has no grouped heads:
        # torch would fall back to products that write all scores, [B, N, L, S].
        k = repeat_heads(k, copies)
        v = repeat_heads(v, copies)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=is_causal,
        enable_gqa=q.shape[1] != k.shape[1],
        scale=scale,
    )


def repeat_heads(x: Tensor, copies: int) -> Tensor:
    """Repeat each head for the query heads of its group, [B, G, S, H] -> [B, G * copies, S, H]."""
    return x.repeat_interleave(copies, dim=1)


class _CappedAttention(torch.autograd.Function):
    """Attention with bounded scores; backward computes the probabilities again, so that only q, k and v are kept.

        forward    t = tanh(scale q k^T / cap),  p = softmax(cap t),  o = p v
        backward   dv = p^T do,  dp = do v^T,  dz = p (dp - sum(dp p))
                   ds = dz (1 - t^2),  dq = scale ds k,  dk = scale ds^T q

    The query heads of a group are rows of one matrix, [B, G, R L, H], so that the
    products with a transpose also sum over the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor | None,
        scale: float,
        softcap: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, visible)
        ctx.scale = scale
        ctx.softcap = softcap
        q_rows = _by_group(q, k)
        _, probabilities = _capped_scores(
            q_rows, k, visible, scale=scale, softcap=softcap
        )
        out = probabilities.to(v.dtype) @ v  # [B, G, R L, H]
        return out.view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, visible = ctx.saved_tensors
        q_rows = _by_group(q, k)  # [B, G, R L, H], as do
        do = _by_group(grads[0], k)
        tanh, probabilities = _capped_scores(
            q_rows,
            k,
            visible,
            scale=ctx.scale,
            softcap=ctx.softcap,
        )
        dv = probabilities.to(do.dtype).mT @ do

        # The softmax: each row of dz sums to 0, as each row of p sums to 1.
        dp = do @ v.mT
        dp = dp.to(probabilities.dtype)
        row_sum = (dp * probabilities).sum(dim=-1, keepdim=True)
        dz = probabilities * (dp - row_sum)

        # The cap: 1 - t^2 is 0 where the cap bounds a score.
        slope = 1 - tanh.square()
        ds = dz * slope * ctx.scale
        ds = ds.to(q.dtype)

        dq = ds @ k
        dk = ds.mT @ q_rows
        return dq.view(q.shape), dk, dv, None, None, None


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """Return [B, N, L, H] as [B, G, R L, H]."""
    batch, _, _, width = x.shape
    return x.reshape(batch, k.shape[1], -1, width)


def _capped_scores(
    q_rows: Tensor,
    k: Tensor,
    visible: Tensor | None,
    *,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return tanh(scores / softcap) and the probabilities, both [B, G, R L, S] in at least float32."""
    products = q_rows @ k.mT
    scores = products.to(promote(q_rows.dtype))
    tanh = scores.mul_(scale / softcap).tanh_()
    capped = tanh * softcap
    if visible is not None:
        _hide(capped, visible)
    return tanh, capped.softmax(dim=-1)


def _hide(scores: Tensor, visible: Tensor) -> None:
    """Set the scores [B, G, R L, S] of keys that are not ``visible`` to minus infinity."""
    hidden_keys = ~visible
    if visible.dim() == 4:
        hidden_keys = hidden_keys.unsqueeze(2)  # [B, 1, 1, 1, S]
    # Each query head of a group sees the same keys: [B, G, R, L, S].
    batch, groups, _, keys = scores.shape
    by_head = scores.view(batch, groups, -1, visible.shape[-2], keys)
    by_head.masked_fill_(hidden_keys, -torch.inf)
