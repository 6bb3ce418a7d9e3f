"""Torch's paged attention as its docstring describes it, without a GPU and without a look at a value.

Pages are gathered by the block table, and attention is dense. What the kernel for CUDA
refuses is refused: other integers than int32, heads that differ without ``enable_gqa``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    assert cu_seq_k is not None and seqused_k is not None and block_table is not None
    rows, heads, width = query.shape
    groups = key.shape[2]
    for integers in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert integers.dtype == torch.int32
    assert cu_seq_q.shape == cu_seq_k.shape == (rows + 1,) and max_q == 1
    assert seqused_k.shape == (rows,) and seqused_k.is_contiguous()
    assert block_table.shape[0] == rows and block_table.stride(1) == 1
    assert enable_gqa or heads == groups
    assert key.shape == value.shape and key.dtype == query.dtype == value.dtype
    assert query.stride(2) == key.stride(3) == value.stride(3) == 1

    keys = key[block_table.long()].flatten(1, 2)  # [rows, W S, G, H]
    values = value[block_table.long()].flatten(1, 2)
    place = torch.arange(keys.shape[1], device=key.device)
    last = seqused_k.long()[:, None] - 1
    visible = (place <= last) & (place < max_k)
    before, after = window_size
    if before >= 0:
        visible &= place >= last - before
    assert after in (-1, 0)
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.view(rows, groups, heads // groups, width).to(wide)
    scores = torch.einsum("bgrh,bkgh->bgrk", grouped, keys.to(wide))
    scores = scores * (width**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    # Numbers that nobody sees may be none.
    values = values.to(wide).masked_fill(~visible[:, :, None, None], 0.0)
    out = torch.einsum("bgrk,bkgh->bgrh", scores.softmax(-1), values)
    return out.flatten(1, 2).to(query.dtype)
