"""The data of one data-parallel rank in one step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

# Packing imports this module, and ``evomesh data`` must start without torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TokenNumbers:
    """Numbers that dropout masks are drawn from; see ``layers/dropout.py``.

    Attributes:
        key: [2] int64, seed and step.
        tokens: [M, T] int64, number of each token in the step, over all ranks.
    """

    key: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Batch:
    """M micro-batches of one pack each: T tokens in K - 1 segments.

    Attributes:
        tokens: [M, T] int64, never negative.
        labels: [M, T] int64, the token to predict at each position, ``IGNORE`` where there is none.
        position_ids: [M, T] int64, position within the segment, restarting at 0.
        type_ids: [M, T] int64, index into the dataset's ``types``.
        cu_seqlens: [M, K] int32, segment bounds 0 .. T of each micro-batch, padded on the right by repeating T; from a
            loader, K - 1 is a power of two.
        max_seqlen: longest segment over all micro-batches (a Python int: reading it never syncs with the device).
        host_bounds: ``cu_seqlens`` on the host, set once the batch is on a device.
        numbers: set for training with dropout; without it nothing is dropped.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    host_bounds: Tensor | None = None
    numbers: TokenNumbers | None = None

    def numbered(self, seed: int, step: int, dp_rank: int, dp_size: int) -> Batch:
        """Return the batch of data-parallel rank ``dp_rank`` with the numbers of its tokens in ``step``.

        Micro-batch m holds pack ``dp_rank + m * dp_size`` of the step (invariant 10), so a token has the same number
        in every layout.
        """
        import torch

        num_packs, length = self.tokens.shape
        packs = dp_rank + torch.arange(num_packs) * dp_size
        tokens = packs[:, None] * length + torch.arange(length)
        return replace(self, numbers=TokenNumbers(torch.tensor([seed, step]), tokens))

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``, with its bounds also kept on the host.

        Copies from pinned memory are asynchronous: the host does not wait for them.
        """
        if device.type == "cpu":
            return self

        def copy(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        # The bounds stay on the host too: reading them from the device would make the
        # host wait for it.
        numbers = self.numbers
        if numbers is not None:
            numbers = TokenNumbers(copy(numbers.key), copy(numbers.tokens))
        return replace(
            self,
            tokens=copy(self.tokens),
            labels=copy(self.labels),
            position_ids=copy(self.position_ids),
            type_ids=copy(self.type_ids),
            cu_seqlens=copy(self.cu_seqlens),
            host_bounds=self.cu_seqlens,
            numbers=numbers,
        )
