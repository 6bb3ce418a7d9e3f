"""Where the documents of one packed sequence begin and end.

Shapes: T packed tokens, K document bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


@dataclass(
    eq=False
)  # not frozen, for torch 2.11's compiler looks into those, and compiles for a number of bounds
class SequenceBounds:
    """Never changed once made.

    Attributes:
    position_ids: [T] int64, position of each token within its document.
    cu_seqlens: [K] int32, bounds 0 .. T, padded on the right by repeating T.
    max_seqlen: an upper bound of the document length, a Python int so that no kernel waits for the device.
    host_bounds: ``cu_seqlens`` on the host, where the former lies on a device and somebody has kept the original.
    """

    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    host_bounds: Tensor | None = None

    def lengths(self) -> list[int]:
        """Lengths of the non-empty documents (waits for the device when there are no bounds on the host)."""
        bounds = (self.cu_seqlens if self.host_bounds is None else self.host_bounds).tolist()
        return [stop - start for start, stop in pairwise(bounds) if stop > start]

    def span(self) -> Tensor:
        """[T] int64: for each token, one more than the last position of its own document."""
        # The index of a token's document counts the bounds at or before it; padded bounds lie behind every token.
        tokens = torch.arange(
            self.position_ids.shape[0], device=self.position_ids.device, dtype=self.cu_seqlens.dtype
        )
        document = torch.searchsorted(self.cu_seqlens, tokens, right=True)
        return self.position_ids[self.cu_seqlens[document].long() - 1] + 1


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


def micro_batch_bounds(batch: PackedSequences, index: int) -> SequenceBounds:
    """Return the sequence bounds of micro-batch ``index`` of a batch."""
    host_bounds = None if batch.host_bounds is None else batch.host_bounds[index]
    return SequenceBounds(batch.position_ids[index], batch.cu_seqlens[index], batch.max_seqlen, host_bounds)


def single_sequence(length: int, *, start: int = 0, device: torch.device | str = "cpu") -> SequenceBounds:
    """One document of ``length`` tokens whose first token has position ``start``."""
    positions = torch.arange(start, start + length, device=device)
    return SequenceBounds(positions, torch.tensor([0, length], dtype=torch.int32, device=device), length)
