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

from evomesh.layers.documents import Documents
from evomesh.layers.linear import ColumnLinear, RowLinear
from evomesh.layers.placement import Placement
from evomesh.layers.rotary import split_rotate
from evomesh.parallel.collectives import all_to_all

__all__ = ["Attend", "Attention", "Documents", "attend", "outside_graph"]

# attend(layer, q [T, N, H], k [T, G, H], v [T, G, H], docs) -> [T, N, H]; generation passes one that keeps k and v.
Attend = Callable[[int, Tensor, Tensor, Tensor, Documents], Tensor]


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    """softmax(q k^T / sqrt(H)) v within each document, causal. ``layer`` is for callers that keep a cache."""
    del layer
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q, k, v, docs)
    return _per_document(q, k, v, docs)


@cache
def outside_graph(attend: Attend) -> Attend:
    """``attend`` for compiled blocks, which are not to look into it: document lengths are data, and each would be
    compiled anew. Made on demand, because torch takes 0.7 s to import its compiler."""
    return torch.compiler.disable(attend)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def _varlen(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    """torch's variable-length flash kernel. Its signature changed after 2.11; what it lacks is made up for here."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    bounds, longest = docs.cu_seqlens, docs.max_seqlen
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple only on demand
    return out


def _per_document(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    """One call a run of equally long neighbours: work grows with the documents' lengths squared, not with T squared.

    ``split`` rather than slices, because its backward is one concatenation for all documents.
    """
    runs = [(length, len(list(same))) for length, same in groupby(docs.lengths())]
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
        layer: global layer index, handed to ``attend``.
        interleaved: rotary pairs are neighbouring columns (``qk_interleaved``).
    """

    def __init__(
        self, layer: int, size: int, *, heads: int, kv_heads: int, bias: bool, interleaved: bool, at: Placement
    ) -> None:
        super().__init__()
        self.layer, self.interleaved = layer, interleaved
        self.head_dim = size // heads
        self.at = at
        self.kv_heads = kv_heads // at.axis.size  # attended to here, each with its group of query heads
        self.wqkv = ColumnLinear(size, (heads + 2 * kv_heads) * self.head_dim, bias=bias, at=at)
        self.wo = RowLinear(heads * self.head_dim, size, bias=bias, at=at)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], docs: Documents, attend: Attend = attend) -> Tensor:
        qkv = self.wqkv(x)
        if self.at.exchanges:  # q, k and v of a key/value head are neighbours, so that one exchange moves all three
            qkv = all_to_all(qkv, self.at.axis, split_dim=1, concat_dim=0)
        q, k, v = split_rotate(
            qkv, *tables, kv_heads=self.kv_heads, head_dim=self.head_dim, interleaved=self.interleaved
        )
        context = attend(self.layer, q, k, v, docs).flatten(1)
        if self.at.exchanges:
            context = all_to_all(context, self.at.axis, split_dim=0, concat_dim=1)
        out: Tensor = self.wo(context)
        return out
