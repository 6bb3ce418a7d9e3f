"""Keys and values of the tokens seen so far, kept so that each new token costs one row of attention.

Shapes: S slots, C capacity in tokens, B sequences in use, T packed tokens of one call, N query heads, G key/value
heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evomesh.layers.attention import Attention, AttentionFunction, SequenceBounds, attend


class KeyValueCache:
    """Rotated keys and values of up to S sequences of unequal length, one pair of [S, G, C, H] tensors a layer.

    Sequences in use lie in slots 0 .. B - 1, so that a decoding step reads one view of the cache and copies nothing.
    A call of the model is opened with ``prompts`` (whole new sequences, packed) or ``step`` (one token of each
    sequence); both give what ``Decoder.forward`` takes as documents and as its attention.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.lengths: list[int] = []
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def prompts(
        self, lengths: Sequence[int], device: torch.device
    ) -> tuple[SequenceBounds, AttentionFunction]:
        """Takes a slot for each of these prompts, behind those in use; the next call holds their tokens."""
        first = len(self.lengths)
        if first + len(lengths) > self.slots or max(lengths) > self.capacity:
            raise ValueError(f"no room for prompts of {list(lengths)} tokens beside {first} sequences")
        self.lengths += lengths
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])
        docs = SequenceBounds(positions.to(device), bounds.to(device), max(lengths))

        def fill(q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds, module: Attention) -> Tensor:
            for cached, new in zip(self._tensors(module.layer, k), (k, v), strict=True):
                for slot, part in enumerate(torch.split(new, list(lengths)), first):
                    cached[slot, :, : len(part)] = part.transpose(0, 1)
            out: Tensor = attend(q, k, v, bounds, module)
            return out

        return docs, fill

    def step(self, device: torch.device) -> tuple[SequenceBounds, AttentionFunction]:
        """The next call holds one more token of each sequence in use."""
        count, longest = len(self.lengths), max(self.lengths) + 1
        if longest > self.capacity:
            raise ValueError(f"a sequence is longer than the cache's {self.capacity} tokens")
        positions = torch.tensor(self.lengths, device=device)
        docs = SequenceBounds(positions, torch.arange(count + 1, dtype=torch.int32, device=device), 1)
        even = min(self.lengths) + 1 == longest
        seen = None if even else (torch.arange(longest, device=device) <= positions[:, None])[:, None, None]
        rows = torch.arange(count, device=device)
        self.lengths = [length + 1 for length in self.lengths]

        def look_back(q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds, module: Attention) -> Tensor:
            keys, values = self._tensors(module.layer, k)
            if even:
                keys[:count, :, longest - 1], values[:count, :, longest - 1] = k, v
            else:
                keys[rows, :, positions], values[rows, :, positions] = k, v
            # The query heads of a group stand where SDPA has query positions: no key is repeated for them.
            grouped = q.reshape(count, k.shape[1], -1, q.shape[2])
            seen_keys, seen_values = keys[:count, :, :longest], values[:count, :, :longest]
            return F.scaled_dot_product_attention(grouped, seen_keys, seen_values, attn_mask=seen).flatten(
                1, 2
            )

        return docs, look_back

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Gives up a sequence: the last one in use moves into its slot, and no trace of it stays.

        A masked product with a NaN that an earlier sequence left would still be NaN, hence the zeros.
        """
        last, end = len(self.lengths) - 1, max(self.lengths[slot], self.lengths[-1])
        for tensors in self._layers.values():
            for cached in tensors:
                if slot != last:
                    cached[slot, :, :end] = cached[last, :, :end]
                cached[last, :, :end] = 0
        self.lengths[slot] = self.lengths[last]
        self.lengths.pop()

    @torch.inference_mode()
    def take(self, rows: Sequence[int]) -> None:
        """The sequence in slot ``rows[i]`` is wanted in slot i; one may be wanted several times, or not at all."""
        moves = [(i, row) for i, row in enumerate(rows) if i != row]
        if moves:
            end = max(self.lengths)
            to, source = map(list, zip(*moves, strict=True))
            for tensors in self._layers.values():
                for cached in tensors:
                    cached[to, :, :end] = cached[source, :, :end]
        self.lengths = [self.lengths[row] for row in rows]

    def bytes(self) -> int:
        """Memory held by this rank's cache."""
        return sum(t.numel() * t.element_size() for tensors in self._layers.values() for t in tensors)

    def _tensors(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros at first, since a masked product with uninitialised memory could be NaN."""
        if layer not in self._layers:
            room = (self.slots, like.shape[1], self.capacity, like.shape[2])
            self._layers[layer] = (like.new_zeros(room), like.new_zeros(room))
        return self._layers[layer]
