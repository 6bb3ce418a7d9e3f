"""Pinned memory of saves, with an allocator that rounds up as torch's does."""

from __future__ import annotations

import torch

from evomesh.checkpoint.native.staging import ALIGNMENT, BLOCK, PinnedMemory


def shapes_of_7b(ranks: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What a rank saves of the state: weights of 16 bits, masters and moments of its rows."""
    hidden, mlp, vocab = 4096, 11008, 103168
    block = [
        (3 * hidden, hidden),
        (hidden, hidden),
        *[(mlp, hidden)] * 2,
        (hidden, mlp),
    ]
    matrices = [*block * 32, *[(vocab, hidden)] * 2]
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
    for rows, columns in matrices:
        share = (rows // ranks, columns)
        shapes += [(share, torch.bfloat16), *[(share, torch.float32)] * 3]
    return shapes


def test_a_rank_s_state_takes_hardly_more_than_its_bytes() -> None:
    blocks: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        blocks.append(size)
        return torch.empty(size, dtype=torch.uint8, device="meta")

    memory = PinnedMemory(allocate)
    needed = one_by_one = 0
    for shape, dtype in shapes_of_7b(8):
        source = torch.empty(shape, dtype=dtype, device="meta")
        buffer = memory.empty_like(source)
        assert (buffer.shape, buffer.dtype) == (source.shape, dtype)
        needed += source.nbytes
        one_by_one += 1 << (source.nbytes - 1).bit_length()
    assert all(size & (size - 1) == 0 for size in blocks), "torch would round them up"
    assert sum(blocks) < 1.05 * needed < one_by_one / 1.2


def test_buffers_do_not_overlap() -> None:
    memory = PinnedMemory(lambda size: torch.zeros(size, dtype=torch.uint8))
    sources = [
        torch.full((3,), 1.0),
        torch.full((5, 7), 2, dtype=torch.int64),
        torch.full((), 3.0, dtype=torch.bfloat16),
        torch.full((0, 4), 4.0),
        torch.full((ALIGNMENT,), 5, dtype=torch.uint8),
        torch.full((BLOCK // 4 + 1,), 6.0),  # larger than a block
        torch.full((2, 2), 7.0, dtype=torch.float64),
    ]
    buffers = [memory.empty_like(source).copy_(source) for source in sources]
    for buffer, source in zip(buffers, sources, strict=True):
        assert torch.equal(buffer, source) and buffer.is_contiguous()
