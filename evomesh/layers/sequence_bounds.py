"""Bounds of the segments of one pack: where each begins and ends, and the position of each token in it.

Shapes: T packed tokens, K segment bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from evomesh.layers.dropout import MaskNumbers
from evomesh.rounding import next_power_of_two


# Not frozen: torch 2.11's compiler inspects frozen dataclasses, and recompiles for each
# number of bounds.
@dataclass(eq=False)
class SequenceBounds:
    """Segments of one pack. Treat it as immutable.

    Attributes:
        position_ids: [T] int64, position of each token within its segment.
        cu_seqlens: [K] int32, bounds 0 .. T, padded on the right by repeating T.
        max_seqlen: an upper bound of the segment length, a Python int so that no kernel waits for the device.
        host_bounds: ``cu_seqlens`` in host memory, if the original was kept when it moved to a device.
        numbers: what dropout masks are drawn from; None where nothing is dropped.
    """

    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    host_bounds: Tensor | None = None
    numbers: MaskNumbers | None = None

    def at_layer(self, layer: int) -> SequenceBounds:
        """Return the bounds with mask numbers of ``layer``."""
        if self.numbers is None:
            return self
        return replace(self, numbers=self.numbers.at_layer(layer))

    def lengths(self) -> list[int]:
        """Return the lengths of the non-empty segments; waits for the device if there are no bounds on the host."""
        bounds = (
            self.cu_seqlens if self.host_bounds is None else self.host_bounds
        ).tolist()
        return [stop - start for start, stop in pairwise(bounds) if stop > start]

    def kernel_max_seqlen(self) -> int:
        """Return ``max_seqlen``, rounded up to a power of two where that is not more than T.

        cuDNN's attention keeps a plan for each value that it has seen, and flash does
        not mind.
        """
        rounded = next_power_of_two(self.max_seqlen)
        return min(rounded, self.position_ids.shape[0])

    def span(self) -> Tensor:
        """Return [T] int64: for each token, the last position of its segment plus one."""
        positions = self.position_ids
        bounds = self.cu_seqlens
        tokens = torch.arange(
            len(positions), device=positions.device, dtype=bounds.dtype
        )
        # The number of bounds at or before a token is the index of its segment's end;
        # padded bounds come after all.
        end_index = torch.searchsorted(bounds, tokens, right=True)
        segment_end = bounds[end_index].long()
        last_position = positions[segment_end - 1]
        return last_position + 1


class NumberedTokens(Protocol):
    """Seed and step [2], and the number of each token [M, T], as ``data/batch.py`` has them."""

    @property
    def key(self) -> Tensor: ...
    @property
    def tokens(self) -> Tensor: ...


class PackedSequences(Protocol):
    """M packs side by side: the arrays of a batch from which sequence bounds are made."""

    @property
    def position_ids(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...
    @property
    def max_seqlen(self) -> int: ...
    @property
    def host_bounds(self) -> Tensor | None: ...
    @property
    def numbers(self) -> NumberedTokens | None: ...


def micro_batch_bounds(batch: PackedSequences, index: int) -> SequenceBounds:
    """Return the sequence bounds of micro-batch ``index`` of a batch."""
    host_bounds = None if batch.host_bounds is None else batch.host_bounds[index]
    numbers = None
    if batch.numbers is not None:
        numbers = MaskNumbers.of_pack(batch.numbers.key, batch.numbers.tokens[index])
    return SequenceBounds(
        batch.position_ids[index],
        batch.cu_seqlens[index],
        batch.max_seqlen,
        host_bounds,
        numbers,
    )


def single_sequence(length: int, *, start: int = 0) -> SequenceBounds:
    """Return the bounds of one segment of ``length`` tokens whose first token has position ``start``."""
    positions = torch.arange(start, start + length)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    return SequenceBounds(positions, cu_seqlens, length)
