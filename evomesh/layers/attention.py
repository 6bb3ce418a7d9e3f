"""Causal self-attention that never crosses a segment bound.

Shapes: T packed tokens, D model, N query heads, G key/value heads, H head dim, L segment length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomesh.layers.linear import ColumnParallelLinear, RowParallelLinear
from evomesh.layers.placement import Placement
from evomesh.layers.rotary import split_and_rotate
from evomesh.layers.sequence_bounds import SequenceBounds
from evomesh.parallel.collectives import all_to_all

__all__ = ["Attention", "AttentionFunction", "SequenceBounds", "attend", "outside_graph"]

# (q [T, N, H], k [T, G, H], v [T, G, H], bounds, module) -> [T, N, H]. Generation passes one that keeps k and v by
# ``module.layer``. It takes the module rather than the layer number: a compiled block specializes on a number it reads.
AttentionFunction = Callable[[Tensor, Tensor, Tensor, SequenceBounds, "Attention"], Tensor]
FLASH_HEAD_DIM = 256  # the largest that the flash kernel supports


def attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds, module: Attention | None = None
) -> Tensor:
    """Compute causal softmax(q k^T / sqrt(H)) v within each segment.

    Args:
        q: [T, N, H]; k and v: [T, G, H].
        module: unused here; attention functions that keep a key/value cache look it up by ``module.layer``.
    """
    return _varlen(q, k, v, bounds) if _flash_takes(q) else _per_segment(q, k, v, bounds)


def outside_graph(attend: AttentionFunction) -> AttentionFunction:
    """Wrap ``attend`` so that compiled blocks do not trace into it: lengths are data, and each would recompile it.

    All wrappers are objects of one class, so that a block compiled for one accepts any other.
    """
    return _outside_graph()(attend)


@cache
def _outside_graph() -> Callable[[AttentionFunction], AttentionFunction]:
    """Create the wrapper class on demand, because torch takes 0.7 s to import its compiler."""

    class OutsideGraph:
        def __init__(self, attend: AttentionFunction) -> None:
            self.attend = attend

        @torch.compiler.disable  # type: ignore[misc, untyped-decorator, unused-ignore]
        def __call__(
            self, q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds, module: Attention
        ) -> Tensor:
            return self.attend(q, k, v, bounds, module)

    return OutsideGraph


def _flash_takes(q: Tensor) -> bool:
    """Return whether torch's flash kernel supports this device, dtype and head dim."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return q.shape[2] % 8 == 0 and q.shape[2] <= FLASH_HEAD_DIM and _has_flash(q.device)


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _varlen_options(varlen_attn: Callable[..., Any], grouped: bool) -> dict[str, Any]:
    """Return the options of causal attention for torch's ``varlen_attn``, whose signature changed after 2.11."""
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return options | {"enable_gqa": True} if grouped and "enable_gqa" in known else options


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds) -> Tensor:
    """Attend with torch's variable-length flash kernel; the maximum length is an argument, so the host never waits."""
    from torch.nn.attention.varlen import varlen_attn

    heads = q.shape[1]
    kv_heads = k.shape[1]
    grouped = kv_heads != heads
    options = _varlen_options(varlen_attn, grouped)
    if grouped and "enable_gqa" not in options:
        # This version of the kernel wants as many key/value heads as query heads.
        k = _repeat_heads(k, heads // kv_heads)
        v = _repeat_heads(v, heads // kv_heads)
    cu_seqlens = bounds.cu_seqlens
    longest = bounds.max_seqlen
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple only on demand
    return out


def _repeat_heads(x: Tensor, copies: int) -> Tensor:
    """Repeat each head for its group of query heads, [T, G, H] -> [T, G * copies, H]."""
    return x.unsqueeze(2).expand(-1, -1, copies, -1).flatten(1, 2)


def _per_segment(q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds) -> Tensor:
    """Attend with one call per run of equally long segments: work grows with their lengths squared, not with T squared.

    ``torch.split`` rather than slices, because its backward is one concatenation for all runs.
    """
    # A run is `count` consecutive segments of L tokens each: segment lengths 5 5 5 2 make the runs (5, 3) and (2, 1).
    runs = [(length, len(list(group))) for length, group in groupby(bounds.lengths())]
    tokens_of_runs = [length * count for length, count in runs]
    q_runs = torch.split(q, tokens_of_runs)
    k_runs = torch.split(k, tokens_of_runs)
    v_runs = torch.split(v, tokens_of_runs)
    outs = []
    for (length, count), q_run, k_run, v_run in zip(runs, q_runs, k_runs, v_runs, strict=True):
        out = _causal(
            _segments_to_batch(q_run, count, length),
            _segments_to_batch(k_run, count, length),
            _segments_to_batch(v_run, count, length),
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))  # [count, N, L, H] -> [count * L, N, H]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _segments_to_batch(x: Tensor, count: int, length: int) -> Tensor:
    """Return a view of the segments of a run as a batch, [count * L, heads, H] -> [count, heads, L, H]."""
    return x.view(count, length, *x.shape[1:]).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """[T, D] -> [T, D]: fused projection, rotation, attention by segment, output projection.

    In isp, [T / tp, D] -> [T / tp, D]: one all-to-all turns the projection of this rank's sequence shard into the whole
    sequence for its shard of the heads, and a second one turns the output of attention back.

    Args:
        layer: global layer index, for an ``attend`` that keeps keys and values.
        interleaved: rotary pairs are adjacent columns (``qk_interleaved``).
    """

    def __init__(
        self,
        layer: int,
        size: int,
        *,
        heads: int,
        kv_heads: int,
        bias: bool,
        interleaved: bool,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.layer, self.interleaved = layer, interleaved
        self.head_dim = size // heads
        self.placement = placement
        self.kv_heads = kv_heads // placement.axis.size  # of this rank, each with its group of query heads
        self.wqkv = ColumnParallelLinear(
            size, (heads + 2 * kv_heads) * self.head_dim, bias=bias, placement=placement
        )
        self.wo = RowParallelLinear(heads * self.head_dim, size, bias=bias, placement=placement)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        bounds: SequenceBounds,
        attend: AttentionFunction = attend,
    ) -> Tensor:
        qkv = self.wqkv(x)
        if self.placement.exchanges_heads:
            # q, k and v of a key/value head are adjacent, so that one exchange moves all three.
            qkv = all_to_all(qkv, self.placement.axis, split_dim=1, concat_dim=0)
        q, k, v = split_and_rotate(
            qkv, *tables, kv_heads=self.kv_heads, head_dim=self.head_dim, interleaved=self.interleaved
        )
        context = attend(q, k, v, bounds, self).flatten(1)
        if self.placement.exchanges_heads:
            context = all_to_all(context, self.placement.axis, split_dim=0, concat_dim=1)
        out: Tensor = self.wo(context)
        return out
