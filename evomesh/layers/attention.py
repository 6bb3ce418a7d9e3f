"""Causal self-attention that never looks across a document bound.

Shapes: T packed tokens, D model, N query heads, G key/value heads, H head dim, L document length.
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
FLASH_HEAD_DIM = 256  # the widest that the flash kernel takes


def attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds, module: Attention | None = None
) -> Tensor:
    """Compute causal softmax(q k^T / sqrt(H)) v within each segment.

    Args:
        q: [T, N, H]; k and v: [T, G, H].
        module: unused here; attention functions that keep a key/value cache look it up by ``module.layer``.
    """
    return _varlen(q, k, v, bounds) if _flash_takes(q) else _per_document(q, k, v, bounds)


def outside_graph(attend: AttentionFunction) -> AttentionFunction:
    """``attend`` for compiled blocks, which are not to look into it: document lengths are data, and each would be
    compiled anew. All of them are objects of one class, so that a block compiled for one takes any other."""
    return _outside_graph()(attend)


@cache
def _outside_graph() -> Callable[[AttentionFunction], AttentionFunction]:
    """Made on demand, because torch takes 0.7 s to import its compiler."""

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
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return q.shape[2] % 8 == 0 and q.shape[2] <= FLASH_HEAD_DIM and _has_flash(q.device)


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _varlen_options(varlen_attn: Callable[..., Any], grouped: bool) -> dict[str, Any]:
    """For causal attention by torch's ``varlen_attn``, whose signature changed after 2.11."""
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return options | {"enable_gqa": True} if grouped and "enable_gqa" in known else options


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds) -> Tensor:
    """torch's variable-length flash kernel; it is told the longest document, and waits for no value of the device."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = k.shape[1] != q.shape[1]
    options = _varlen_options(varlen_attn, grouped)
    if grouped and "enable_gqa" not in options:
        copies = q.shape[1] // k.shape[1]
        k, v = (x.unsqueeze(2).expand(-1, -1, copies, -1).flatten(1, 2) for x in (k, v))
    cu_seqlens, longest = bounds.cu_seqlens, bounds.max_seqlen
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple only on demand
    return out


def _per_document(q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds) -> Tensor:
    """One call a run of equally long neighbours: work grows with the documents' lengths squared, not with T squared.

    ``split`` rather than slices, because its backward is one concatenation for all documents.
    """
    runs = [(length, len(list(same))) for length, same in groupby(bounds.lengths())]
    tokens = [length * count for length, count in runs]
    outs = []
    parts = (torch.split(x, tokens) for x in (q, k, v))
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        batch = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)  # each [count, heads, L, H]
        out = _causal(*batch)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """[T, D] -> [T, D]: fused projection, rotation, attention by document, output projection.

    In isp, [T / tp, D] -> [T / tp, D]: the projection of the own part of the sequence goes through one all-to-all to
    all of the sequence for the own part of the heads, and the attention's output through one back.

    Args:
        layer: global layer index, for an ``attend`` that keeps keys and values.
        interleaved: rotary pairs are neighbouring columns (``qk_interleaved``).
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
        self.kv_heads = (
            kv_heads // placement.axis.size
        )  # attended to here, each with its group of query heads
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
        if (
            self.placement.exchanges_heads
        ):  # q, k and v of a key/value head are neighbours, so that one exchange moves all three
            qkv = all_to_all(qkv, self.placement.axis, split_dim=1, concat_dim=0)
        q, k, v = split_and_rotate(
            qkv, *tables, kv_heads=self.kv_heads, head_dim=self.head_dim, interleaved=self.interleaved
        )
        context = attend(q, k, v, bounds, self).flatten(1)
        if self.placement.exchanges_heads:
            context = all_to_all(context, self.placement.axis, split_dim=0, concat_dim=1)
        out: Tensor = self.wo(context)
        return out
