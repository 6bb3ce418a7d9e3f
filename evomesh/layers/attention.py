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

from evomesh.errors import UserError
from evomesh.layers.linear import ColumnParallelLinear, RowParallelLinear
from evomesh.layers.norm import Norm
from evomesh.layers.placement import Placement
from evomesh.layers.rotary import split_and_rotate
from evomesh.layers.sequence_bounds import SequenceBounds
from evomesh.parallel.collectives import all_to_all

__all__ = [
    "Attention",
    "AttentionFunction",
    "SequenceBounds",
    "attend",
    "check_window",
    "outside_graph",
]

# (q [T, N, H], k [T, G, H], v [T, G, H], bounds, module) -> [T, N, H]. Generation passes one that keeps k and v by
# ``module.layer``. It takes the module rather than the layer number: a compiled block specializes on a number it reads.
AttentionFunction = Callable[
    [Tensor, Tensor, Tensor, SequenceBounds, "Attention"], Tensor
]
FLASH_HEAD_DIM = 256  # the largest that the flash kernel supports


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: SequenceBounds,
    module: Attention | None = None,
) -> Tensor:
    """Compute causal softmax(q k^T / sqrt(H)) v within each segment.

    Args:
        q: [T, N, H]; k and v: [T, G, H].
        module: unused here; attention functions that keep a key/value cache look it up by ``module.layer``.
    """
    return (
        _varlen(q, k, v, bounds) if _flash_takes(q) else _per_segment(q, k, v, bounds)
    )


def check_window(tokens: int, window: int | None) -> None:
    """Refuse a segment that is longer than the window of the model's attention, beyond which no token looks.

    Raises:
        UserError: with both lengths.
    """
    if window is not None and tokens > window:
        raise UserError(
            f"a text of {tokens} tokens, and the model's sliding window is {window}",
            where="model.sliding_window",
            expected=f"texts of up to {window} tokens: longer ones need a window in the attention, which evomesh "
            "does not have",
            fix="shorten the text, or the answer",
        )


def outside_graph(attend: AttentionFunction) -> AttentionFunction:
    """Wrap ``attend`` so that compiled blocks do not trace into it: lengths are data, and each would recompile it.

    All wrappers are objects of one class, so that a block compiled for one accepts any
    other.
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
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            bounds: SequenceBounds,
            module: Attention,
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
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    return (
        options | {"enable_gqa": True} if grouped and "enable_gqa" in known else options
    )


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
    # A run is `count` consecutive segments of L tokens each: segment lengths 5 5 5 2
    # make the runs (5, 3) and (2, 1).
    runs = [(length, len(list(group))) for length, group in groupby(bounds.lengths())]
    tokens_of_runs = [length * count for length, count in runs]
    q_runs = torch.split(q, tokens_of_runs)
    k_runs = torch.split(k, tokens_of_runs)
    v_runs = torch.split(v, tokens_of_runs)
    outs = []
    for (length, count), q_run, k_run, v_run in zip(
        runs, q_runs, k_runs, v_runs, strict=True
    ):
        out = _causal(
            _segments_to_batch(q_run, count, length),
            _segments_to_batch(k_run, count, length),
            _segments_to_batch(v_run, count, length),
        )
        outs.append(
            out.transpose(1, 2).flatten(0, 1)
        )  # [count, N, L, H] -> [count * L, N, H]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _segments_to_batch(x: Tensor, count: int, length: int) -> Tensor:
    """Return a view of the segments of a run as a batch, [count * L, heads, H] -> [count, heads, L, H]."""
    return x.view(count, length, *x.shape[1:]).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


class Attention(nn.Module):
    """[T, D] -> [T, D]: fused projection, rotation, attention by segment, output projection.

    In isp, [T / tp, D] -> [T / tp, D]: one all-to-all turns the projection of this rank's sequence shard into the whole
    sequence for its shard of the heads, and a second one turns the output of attention back.

    Args:
        layer: global layer index, for an ``attend`` that keeps keys and values.
        interleaved: rotary pairs are adjacent columns (``qk_interleaved``).
        head_dim: H; None: D / N.
        out_bias: bias of the output projection; None: as ``bias``, which is that of queries, keys and values.
        head_norms: norms of queries and keys over each head (``qk_norm``), whose weights [H] all heads share.
        window: longest segment, in tokens (``sliding_window``); None: any.
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
        head_dim: int | None = None,
        out_bias: bool | None = None,
        head_norms: tuple[Norm, Norm] | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.interleaved, self.window = layer, interleaved, window
        self.head_dim = head_dim or size // heads
        self.placement = placement
        self.kv_heads = (
            kv_heads // placement.axis.size
        )  # of this rank, each with its group of query heads
        self.wqkv = ColumnParallelLinear(
            size, (heads + 2 * kv_heads) * self.head_dim, bias=bias, placement=placement
        )
        has_out_bias = bias if out_bias is None else out_bias
        self.wo = RowParallelLinear(
            heads * self.head_dim, size, bias=has_out_bias, placement=placement
        )
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if head_norms is not None:
            self.q_norm, self.k_norm = head_norms

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        bounds: SequenceBounds,
        attend: AttentionFunction = attend,
    ) -> Tensor:
        qkv = self.wqkv(x)
        if self.placement.exchanges_heads:
            # q, k and v of a key/value head are adjacent, so that one exchange moves
            # all three.
            qkv = all_to_all(qkv, self.placement.axis, split_dim=1, concat_dim=0)
        qkv = self._with_normed_heads(qkv)
        q, k, v = split_and_rotate(
            qkv,
            *tables,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            interleaved=self.interleaved,
        )
        context = attend(q, k, v, bounds, self).flatten(1)
        if self.placement.exchanges_heads:
            context = all_to_all(
                context, self.placement.axis, split_dim=0, concat_dim=1
            )
        out: Tensor = self.wo(context)
        return out

    def _with_normed_heads(self, qkv: Tensor) -> Tensor:
        """Return the fused projection [T, G (R + 2) H] with each query head and each key head normed."""
        if self.q_norm is None or self.k_norm is None:
            return qkv
        groups = qkv.view(
            qkv.shape[0], self.kv_heads, -1, self.head_dim
        )  # [T, G, R + 2, H]
        queries = groups[:, :, :-2]
        keys = groups[:, :, -2:-1]
        normed_queries = self.q_norm(queries.reshape(-1, self.head_dim)).view(
            queries.shape
        )
        normed_keys = self.k_norm(keys.reshape(-1, self.head_dim)).view(keys.shape)
        return torch.cat((normed_queries, normed_keys, groups[:, :, -1:]), dim=2).view(
            qkv.shape
        )
