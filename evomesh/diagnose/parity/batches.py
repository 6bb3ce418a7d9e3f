"""Packs for a comparison of layouts: a function of step and index alone, with segments of uneven lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from evomesh.config.schema import IGNORE, Config
from evomesh.data.batch import Batch

MOST_SEGMENTS = 4


def make_batch(config: Config, step: int, dp_rank: int, dp_size: int) -> Batch:
    """Return the packs of one data-parallel rank: numbers ``dp_rank + m * dp_size`` of the step, as in training."""
    tokens = config.data.packed_length
    packs = []
    for micro_batch in range(config.data.micro_num):
        index = dp_rank + micro_batch * dp_size
        packs.append(_pack(config.model.vocab_size, tokens, step, index))
    ids, labels, positions, bounds = map(torch.stack, zip(*packs, strict=True))
    batch = Batch(
        tokens=ids,
        labels=labels,
        position_ids=positions,
        type_ids=torch.zeros_like(ids),
        cu_seqlens=bounds,
        max_seqlen=tokens,
    )
    if config.model.has_dropout:
        return batch.numbered(config.run.seed, step, dp_rank, dp_size)
    return batch


class _ParityPack(NamedTuple):
    """Ids, labels and positions [T], and the bounds [K] of a pack's segments."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    bounds: Tensor


def _pack(
    vocab_size: int,
    tokens: int,
    step: int,
    index: int,
) -> _ParityPack:
    """Draw one pack."""
    # One seed for each pack of each step: a rank draws its packs and no others, and they
    # are the same in every layout.
    draw = torch.Generator()
    draw.manual_seed(1_000_003 * step + index)
    ids = torch.randint(0, vocab_size, (tokens,), generator=draw)
    bounds = _segment_bounds(tokens, index, draw)

    # A token predicts the next one of its segment; the last one of a segment nothing.
    # Positions count from the start of a segment.
    labels = ids.roll(-1)
    positions = torch.arange(tokens)
    for start, stop in pairwise(bounds):
        labels[stop - 1] = IGNORE
        positions[start:stop] -= start

    # All packs have as many bounds, the last of which repeat the end.
    padded_bounds = torch.full((MOST_SEGMENTS + 1,), tokens, dtype=torch.int32)
    padded_bounds[: len(bounds)] = torch.tensor(bounds)
    return _ParityPack(ids, labels, positions, padded_bounds)


def _segment_bounds(tokens: int, index: int, draw: torch.Generator) -> list[int]:
    """Return the ends of one to ``MOST_SEGMENTS`` segments, from 0 to ``tokens``."""
    num_cuts = index % (MOST_SEGMENTS - 1) + 1
    cuts = torch.randint(1, tokens, (num_cuts,), generator=draw)
    return sorted({0, tokens, *cuts.tolist()})
