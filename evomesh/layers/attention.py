"""Causal self-attention that never crosses a segment bound.

Shapes: T packed tokens, D model, N query heads, G key/value heads, H head dim, L segment length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.layers.dropout import MaskNumbers, drop_probabilities
from evomesh.layers.dtype import promote
from evomesh.layers.linear import ColumnParallelLinear, RowParallelLinear
from evomesh.layers.norm import Norm
from evomesh.layers.placement import Placement
from evomesh.layers.rotary import parts_of_groups, split_and_rotate, split_heads
from evomesh.layers.scores import (
    CAPPED_BLOCK,
    PLAIN_SCORES,
    ScoreRule,
    attend_in_groups,
    attend_to_visible,
    repeat_heads,
)
from evomesh.layers.sequence_bounds import SequenceBounds
from evomesh.parallel.collectives import all_to_all
from evomesh.parallel.spec import spec_of, with_spec

__all__ = [
    "Attention",
    "AttentionFunction",
    "SequenceBounds",
    "attend",
    "outside_graph",
]

# (q [T, N, H], k [T, G, H], v [T, G, H], bounds, module) -> [T, N, H]. Generation passes one that keeps k and v by
# ``module.layer``. It takes the module rather than the layer number: a compiled block specializes on a number it reads.
AttentionFunction = Callable[
    [Tensor, Tensor, Tensor, SequenceBounds, "Attention"], Tensor
]
FLASH_HEAD_DIM = 256  # the largest that the flash kernel supports
# Queries of one call, so that a small window makes no tiny products.
MIN_WINDOW_BLOCK = 128


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: SequenceBounds,
    module: Attention | None = None,
) -> Tensor:
    """Compute causal softmax(q k^T / sqrt(H)) v within each segment, and within ``module.window`` where there is one.

    Args:
        q: [T, N, H]; k and v: [T, G, H].
        module: has the window and what replaces q k^T / sqrt(H); attention functions that keep a key/value cache look
            it up by ``module.layer``.
    """
    window = None if module is None else module.window
    scores = PLAIN_SCORES if module is None else module.scores
    if window is not None and window >= bounds.max_seqlen:
        window = None  # it reaches every earlier token
    if bounds.numbers is not None and module is not None and module.drop_rate:
        return _dropping(q, k, v, bounds, window, module)
    # The flash kernel has no soft cap of scores.
    is_capped = scores.softcap is not None
    kernel_fits = not is_capped and _flash_takes(q)
    if kernel_fits and (window is None or _varlen_has_windows()):
        return _varlen(q, k, v, bounds, window, scores.scale)
    return _per_segment(q, k, v, bounds, window, scores)


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
    """Return whether torch's flash kernel supports this device, dtype and head dim; meta stands for a recent GPU."""
    if q.is_cpu or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    fits_head = q.shape[2] % 8 == 0 and q.shape[2] <= FLASH_HEAD_DIM
    return fits_head and (q.is_meta or _has_flash(q.device))


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen_has_windows() -> bool:
    """Return whether torch's ``varlen_attn`` takes a window: its signature changed after 2.11."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


@cache
def _varlen_options(
    varlen_attn: Callable[..., Any], grouped: bool, window: int | None
) -> dict[str, Any]:
    """Return the options of causal attention for torch's ``varlen_attn``, whose signature changed after 2.11."""
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True}
    if "window_size" in known:
        # Keys before and after the query; the query itself is not counted, -1 means all.
        before = -1 if window is None else window - 1
        options = {"window_size": (before, 0)}
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return options


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: SequenceBounds,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend with torch's variable-length flash kernel; the maximum length is an argument, so the host never waits."""
    from torch.nn.attention.varlen import varlen_attn

    heads = q.shape[1]
    kv_heads = k.shape[1]
    grouped = kv_heads != heads
    options = _varlen_options(varlen_attn, grouped, window)
    if grouped and "enable_gqa" not in options:
        # This version of the kernel wants as many key/value heads as query heads.
        k = repeat_heads(k, heads // kv_heads)
        v = repeat_heads(v, heads // kv_heads)
    if scale is not None:
        # Not every version of the kernel takes a scale; all divide by sqrt(H).
        q = q * (scale * q.shape[2] ** 0.5)
    cu_seqlens = bounds.cu_seqlens
    longest = bounds.kernel_max_seqlen()
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple only on demand
    return out


@dataclass(frozen=True)
class SegmentRun:
    """Consecutive segments of equal length: lengths 5 5 5 2 make the runs (5, 3) and (2, 1).

    Attributes:
        length: L, tokens of each segment.
        count: number of segments.
    """

    length: int
    count: int

    def as_batch(self, x: Tensor) -> Tensor:
        """Return a view of the run's rows as a batch, [count * L, heads, H] -> [count, heads, L, H]."""
        batch = x.view(self.count, self.length, *x.shape[1:])
        return batch.transpose(1, 2)


def _runs(lengths: list[int]) -> list[SegmentRun]:
    return [
        SegmentRun(length, len(list(equally_long)))
        for length, equally_long in groupby(lengths)
    ]


def _per_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: SequenceBounds,
    window: int | None = None,
    scores: ScoreRule = PLAIN_SCORES,
) -> Tensor:
    """Attend with one call per run of equally long segments: work grows with their lengths squared, not with T squared.

    ``torch.split`` rather than slices, because its backward is one concatenation for all runs.
    """
    runs = _runs(bounds.lengths())
    tokens = [run.length * run.count for run in runs]
    q_runs = torch.split(q, tokens)
    k_runs = torch.split(k, tokens)
    v_runs = torch.split(v, tokens)
    outs = []
    for run, q_run, k_run, v_run in zip(runs, q_runs, k_runs, v_runs, strict=True):
        out = _causal(
            run.as_batch(q_run),
            run.as_batch(k_run),
            run.as_batch(v_run),
            window,
            scores,
        )
        # [count, N, L, H] -> [count * L, N, H]
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scores: ScoreRule
) -> Tensor:
    """Attend within segments of equal length: q [batch, N, L, H], k and v [batch, G, L, H]."""
    if window is not None and window < q.shape[2]:
        block = max(window, MIN_WINDOW_BLOCK)
        return _in_blocks(q, k, v, window, block, scores)
    if scores.softcap is not None:
        return _in_blocks(q, k, v, q.shape[2], CAPPED_BLOCK, scores)
    return attend_in_groups(
        q,
        k,
        v,
        is_causal=True,
        scale=scores.scale,
    )


def _query_blocks(
    length: int, window: int, block: int
) -> Iterator[tuple[slice, slice]]:
    """Yield the positions of each block of queries, and of the keys that any of them sees.

    A window of 4 and blocks of 2: queries 4 and 5 see the keys 1 to 5.
    """
    for start in range(0, length, block):
        stop = min(start + block, length)
        first_key = max(start - window + 1, 0)
        yield slice(start, stop), slice(first_key, stop)


def _visible(queries: slice, keys: slice, window: int, device: torch.device) -> Tensor:
    """Return bool [queries, keys]: a query sees itself and the ``window`` - 1 keys before it."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    is_causal = key <= query
    is_within_window = key > query - window
    return is_causal & is_within_window


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int, block: int, scores: ScoreRule
) -> Tensor:
    """Attend to the last ``window`` keys, the query's own included.

    A block of queries at a time, with the keys that any of them sees: where L is longer
    than the window, work grows with L times the window, not with L squared.
    """
    outs = []
    for queries, keys in _query_blocks(q.shape[2], window, block):
        out = attend_to_visible(
            q[:, :, queries],
            k[:, :, keys],
            v[:, :, keys],
            visible=_visible(queries, keys, window, q.device),
            rule=scores,
        )
        outs.append(out)
    return torch.cat(outs, dim=2)


def _dropping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: SequenceBounds,
    window: int | None,
    module: Attention,
) -> Tensor:
    """Attend with dropped probabilities, one segment at a time.

    The probabilities exist one by one here. Torch's fused kernels draw their masks from a
    generator, in an order that a layout changes.
    """
    assert bounds.numbers is not None
    numbers = bounds.numbers
    first_head = module.placement.axis.rank * q.shape[1]
    outs = []
    start = 0
    for length in bounds.lengths():
        segment = slice(start, start + length)
        segment_numbers = replace(numbers, tokens=numbers.tokens[segment])
        out = _dropping_segment(
            *(x[segment].transpose(0, 1) for x in (q, k, v)),
            window=window or length,
            rate=module.drop_rate,
            numbers=segment_numbers,
            first_head=first_head,
            rule=module.scores,
        )
        outs.append(out.transpose(0, 1))
        start += length
    return torch.cat(outs)


def _dropping_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    rate: float,
    numbers: MaskNumbers,
    first_head: int,
    rule: ScoreRule,
) -> Tensor:
    """Attend within one segment: q [N, L, H], k and v [G, L, H] -> [N, L, H], a block of queries at a time."""
    heads, length, width = q.shape
    heads_per_group = heads // k.shape[0]
    k = k.repeat_interleave(heads_per_group, dim=0)
    v = v.repeat_interleave(heads_per_group, dim=0)
    # Scores of a block of queries with the keys they see, [N, queries, keys]: the whole
    # [N, L, L] would not fit for long texts.
    outs = []
    for queries, keys in _query_blocks(length, window, MIN_WINDOW_BLOCK):
        products = q[:, queries] @ k[:, keys].transpose(1, 2)
        scores = rule.apply(products.to(promote(q.dtype)), width)
        hidden_keys = ~_visible(queries, keys, window, q.device)
        probabilities = scores.masked_fill(hidden_keys, -torch.inf).softmax(dim=-1)
        dropped = drop_probabilities(
            probabilities,
            rate,
            numbers,
            queries=numbers.tokens[queries],
            first_key=keys.start,
            first_head=first_head,
        )
        out = dropped.to(v.dtype) @ v[:, keys]
        outs.append(out)
    return torch.cat(outs, dim=1)


class Attention(nn.Module):
    """[T, D] -> [T, D]: fused projection, rotation, attention by segment, output projection.

    In isp, [T / tp, D] -> [T / tp, D]: one all-to-all turns the projection of this rank's sequence shard into the whole
    sequence for its shard of the heads, and a second one turns the output of attention back.

    Args:
        layer: global layer index, for an ``attend`` that keeps keys and values.
        interleaved: rotary pairs are adjacent columns (``qk_interleaved``).
        head_dim: H; None: D / N.
        out_bias: bias of the output projection; None: as ``bias``, which is that of queries, keys and values.
        qk_norms: norms of queries and of keys (``qk_norm``): of each head, with weights [H] that all heads share, or of
            all query heads (key heads) together.
        window: tokens that a query sees, its own included (``sliding_window``); None: all earlier ones.
        rotates: False for a layer without rotary positions (``nope_layers``), which sees the order of tokens through
            the causal mask alone.
        scores: scale and soft cap of the scores.
        drop_rate: of attention probabilities (``attn_drop_rate``), where the bounds have mask numbers.
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
        qk_norms: tuple[Norm, Norm] | None = None,
        window: int | None = None,
        rotates: bool = True,
        scores: ScoreRule = PLAIN_SCORES,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.interleaved = interleaved
        self.window = window
        self.rotates = rotates
        self.scores = scores
        self.drop_rate = drop_rate
        self.head_dim = head_dim or size // heads
        self.placement = placement
        # Of this rank, each with its group of query heads.
        self.kv_heads = kv_heads // placement.axis.size
        self.wqkv = ColumnParallelLinear(
            size, (heads + 2 * kv_heads) * self.head_dim, bias=bias, placement=placement
        )
        # An optimizer of whole matrices takes them apart.
        head_rows = (heads // kv_heads * self.head_dim, self.head_dim, self.head_dim)
        packed = replace(spec_of(self.wqkv.weight), packed_rows=head_rows)
        with_spec(self.wqkv.weight, packed)
        has_out_bias = bias if out_bias is None else out_bias
        self.wo = RowParallelLinear(
            heads * self.head_dim, size, bias=has_out_bias, placement=placement
        )
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if qk_norms is not None:
            self.q_norm, self.k_norm = qk_norms
        # Of a key/value head: its query heads, its key and its value.
        self.group_width = (heads // kv_heads + 2) * self.head_dim

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        bounds: SequenceBounds,
        attend: AttentionFunction = attend,
    ) -> Tensor:
        qkv = self._with_norms(self.wqkv(x))
        if self.placement.exchanges_heads:
            # q, k and v of a key/value head are adjacent, so that one exchange moves
            # all three.
            qkv = all_to_all(qkv, self.placement.axis, split_dim=1, concat_dim=0)
        if self.rotates:
            q, k, v = split_and_rotate(
                qkv,
                *tables,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                interleaved=self.interleaved,
            )
        else:
            q, k, v = split_heads(qkv, kv_heads=self.kv_heads, head_dim=self.head_dim)
        context = attend(q, k, v, bounds, self).flatten(1)
        if self.placement.exchanges_heads:
            context = all_to_all(
                context, self.placement.axis, split_dim=0, concat_dim=1
            )
        out: Tensor = self.wo(context)
        return out

    def _with_norms(self, qkv: Tensor) -> Tensor:
        """Return the fused projection [T, G (R + 2) H] with its queries and its keys normed.

        In isp this comes before heads are exchanged: each rank then has whole rows of
        the projection, and no norm needs communication.
        """
        if self.q_norm is None or self.k_norm is None:
            return qkv
        kv_heads = qkv.shape[1] // self.group_width
        queries, keys, values = parts_of_groups(qkv, kv_heads, self.head_dim)
        normed = [
            _norm_rows(self.q_norm, queries),
            _norm_rows(self.k_norm, keys),
            values,
        ]
        groups = torch.cat(normed, dim=2)  # [T, G, R + 2, H]
        return groups.view(qkv.shape)


def _norm_rows(norm: Norm, heads: Tensor) -> Tensor:
    """Norm [T, G, heads, H] in rows of as many columns as the norm has weights: a head, or all of a token's."""
    rows: Tensor = norm(heads.reshape(-1, norm.weight.shape[0]))
    return rows.view(heads.shape)
