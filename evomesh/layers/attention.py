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

from evomesh.layers.documents import SequenceBounds
from evomesh.layers.linear import ColumnParallelLinear, RowParallelLinear
from evomesh.layers.placement import Placement
from evomesh.layers.rotary import split_rotate
from evomesh.parallel.collectives import all_to_all

__all__ = ["Attention", "AttentionFunction", "SequenceBounds", "attend", "outside_graph"]

# attend(asking, q [T, N, H], k [T, G, H], v [T, G, H], docs) -> [T, N, H]; generation passes one that keeps k and v,
# by ``asking.layer``. It is handed the module, for a number that a compiled block reads is compiled into it.
AttentionFunction = Callable[["Attention", Tensor, Tensor, Tensor, SequenceBounds], Tensor]
FLASH_HEAD_DIM = 256  # the widest that the flash kernel takes


def attend(asking: Attention, q: Tensor, k: Tensor, v: Tensor, docs: SequenceBounds) -> Tensor:
    """softmax(q k^T / sqrt(H)) v within each document, causal. ``asking`` is for callers that keep a cache."""
    del asking
    return _varlen(q, k, v, docs) if _flash_takes(q) else _per_document(q, k, v, docs)


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
            self, asking: Attention, q: Tensor, k: Tensor, v: Tensor, docs: SequenceBounds
        ) -> Tensor:
            return self.attend(asking, q, k, v, docs)

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


def _varlen(q: Tensor, k: Tensor, v: Tensor, docs: SequenceBounds) -> Tensor:
    """torch's variable-length flash kernel; it is told the longest document, and waits for no value of the device."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = k.shape[1] != q.shape[1]
    options = _varlen_options(varlen_attn, grouped)
    if grouped and "enable_gqa" not in options:
        copies = q.shape[1] // k.shape[1]
        k, v = (x.unsqueeze(2).expand(-1, -1, copies, -1).flatten(1, 2) for x in (k, v))
    bounds, longest = docs.cu_seqlens, docs.max_seqlen
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple only on demand
    return out


def _per_document(q: Tensor, k: Tensor, v: Tensor, docs: SequenceBounds) -> Tensor:
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
        at: Placement,
    ) -> None:
        super().__init__()
        self.layer, self.interleaved = layer, interleaved
        self.head_dim = size // heads
        self.at = at
        self.kv_heads = kv_heads // at.axis.size  # attended to here, each with its group of query heads
        self.wqkv = ColumnParallelLinear(size, (heads + 2 * kv_heads) * self.head_dim, bias=bias, at=at)
        self.wo = RowParallelLinear(heads * self.head_dim, size, bias=bias, at=at)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        docs: SequenceBounds,
        attend: AttentionFunction = attend,
    ) -> Tensor:
        qkv = self.wqkv(x)
        if (
            self.at.exchanges
        ):  # q, k and v of a key/value head are neighbours, so that one exchange moves all three
            qkv = all_to_all(qkv, self.at.axis, split_dim=1, concat_dim=0)
        q, k, v = split_rotate(
            qkv, *tables, kv_heads=self.kv_heads, head_dim=self.head_dim, interleaved=self.interleaved
        )
        context = attend(self, q, k, v, docs).flatten(1)
        if self.at.exchanges:
            context = all_to_all(context, self.at.axis, split_dim=0, concat_dim=1)
        out: Tensor = self.wo(context)
        return out
