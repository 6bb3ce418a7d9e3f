"""What a batch looks like to a kernel that keeps a plan for each shape it has seen."""

from __future__ import annotations

import math
import random

import numpy as np

from evomesh.data.packing.loader import collate
from evomesh.data.packing.packs import Pack
from evomesh.layers.sequence_bounds import micro_batch_bounds

T = 256


def random_pack(draw: random.Random) -> Pack:
    """Documents of a length that differs from pack to pack."""
    longest = draw.randrange(1, T + 1)
    bounds = [0]
    while bounds[-1] < T:
        bounds.append(min(T, bounds[-1] + draw.randrange(1, longest + 1)))
    ids = np.arange(T, dtype=np.int64)
    return Pack(ids, ids, ids, ids, np.array(bounds, dtype=np.int32))


def test_a_kernel_sees_few_shapes() -> None:
    draw = random.Random(0)
    shapes: set[tuple[int, int]] = set()
    rounded: set[tuple[int, int]] = set()
    for _ in range(1000):
        batch = collate([random_pack(draw) for _ in range(2)])
        segments = batch.cu_seqlens.shape[1] - 1
        bounds = micro_batch_bounds(batch, 0)
        assert batch.max_seqlen <= bounds.kernel_max_seqlen() <= T
        assert bounds.kernel_max_seqlen() < 2 * batch.max_seqlen
        assert (batch.cu_seqlens[:, -1] == T).all()
        segments_found = int((batch.cu_seqlens.diff() > 0).sum(1).max())
        shapes.add((segments_found, batch.max_seqlen))
        rounded.add((segments, bounds.kernel_max_seqlen()))
    assert len(rounded) <= math.log2(T) ** 2 < len(shapes) / 10


def test_a_pack_of_any_length_is_its_own_bound() -> None:
    """600 tokens in one document: 1024 would be more than there are."""
    ids = np.arange(600, dtype=np.int64)
    pack = Pack(ids, ids, ids, ids, np.array([0, 600], dtype=np.int32))
    batch = collate([pack])
    assert batch.cu_seqlens.tolist() == [[0, 600]]
    assert micro_batch_bounds(batch, 0).kernel_max_seqlen() == 600
