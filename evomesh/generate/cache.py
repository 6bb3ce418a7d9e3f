"""The key/value cache: each new token costs one row of attention instead of a pass over all tokens.

Shapes: S slots, C context length, B sequences in use, T packed tokens of one call, N query heads, G key/value
heads, H head dim, L longest sequence in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from evomesh.layers.attention import (
    Attention,
    AttentionFunction,
    SequenceBounds,
    attend,
)
from evomesh.layers.scores import attend_to_visible


class KeyValueCache:
    """Rotated keys and values of up to S sequences of unequal length: two tensors [S, G, C, H] for each layer.

    A layer with a window W keeps the last W tokens of a sequence, [S, G, min(C, W), H]:
    position p is at row p mod W, which later position p + W takes over. Keys are
    rotated already, so that their order does not matter.

    Sequences in use occupy slots 0 .. B - 1, so that a decoding step reads a view of
    the cache and copies nothing. Before each call of the model comes ``prefill`` (whole
    new sequences, packed) or ``decode_step`` (one token of each sequence); both return
    the sequence bounds and the attention function that ``Decoder.forward`` takes.

    Args:
        context_length: maximum number of tokens of one sequence.
    """

    def __init__(self, slots: int, context_length: int) -> None:
        self.slots = slots
        self.context_length = context_length
        self.lengths: list[int] = []  # tokens of the sequence in each slot in use
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def prefill(
        self,
        lengths: Sequence[int],
        device: torch.device,
    ) -> tuple[SequenceBounds, AttentionFunction]:
        """Assign the next free slots to prompts of these lengths; the next call of the model has their tokens.

        Raises:
            ValueError: too few free slots, or a prompt longer than the context length.
        """
        first_slot = len(self.lengths)
        longest = max(lengths)
        if first_slot + len(lengths) > self.slots or longest > self.context_length:
            raise ValueError(
                f"no room for prompts of {list(lengths)} tokens beside {first_slot} sequences: the cache has "
                f"{self.slots} slots of {self.context_length} tokens"
            )
        self.lengths += lengths
        bounds = bounds_of_prompts(lengths, device)

        def store(cached: Tensor, packed: Tensor) -> None:
            sequences = torch.split(packed, list(lengths))  # each [length, G, H]
            for slot, sequence in enumerate(sequences, first_slot):
                _store_sequence(cached[slot], sequence)

        def store_and_attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            bounds: SequenceBounds,
            module: Attention,
        ) -> Tensor:
            cached_keys, cached_values = self._tensors(module, k)
            store(cached_keys, k)
            store(cached_values, v)
            out: Tensor = attend(q, k, v, bounds, module)
            return out

        return bounds, store_and_attend

    def decode_step(
        self, device: torch.device
    ) -> tuple[SequenceBounds, AttentionFunction]:
        """Make room for one more token of each sequence in use; the next call of the model has these tokens.

        Raises:
            ValueError: a sequence has reached the context length.
        """
        count = len(self.lengths)
        longest = max(self.lengths) + 1  # L, with the new token
        if longest > self.context_length:
            raise ValueError(
                f"a sequence is longer than the cache's {self.context_length} tokens"
            )
        positions = torch.tensor(self.lengths, device=device)
        one_token_each = torch.arange(count + 1, dtype=torch.int32, device=device)
        bounds = SequenceBounds(positions, one_token_each, 1)

        # Sequences of equal length need no mask, and one slice takes all new keys.
        equally_long = min(self.lengths) + 1 == longest
        rows = torch.arange(count, device=device)
        self.lengths = [length + 1 for length in self.lengths]

        def store_and_look_back(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            bounds: SequenceBounds,
            module: Attention,
        ) -> Tensor:
            keys, values = self._tensors(module, k)
            capacity = keys.shape[2]
            seen = min(longest, capacity)
            visible: Tensor | None = None
            if equally_long:
                row = (longest - 1) % capacity
                keys[:count, :, row] = k
                values[:count, :, row] = v
            else:
                keys[rows, :, positions % capacity] = k
                values[rows, :, positions % capacity] = v
                # Each sequence sees its own positions only: [B, 1, 1, seen], one row for all heads.
                visible = torch.arange(seen, device=device) <= positions[:, None]
                visible = visible[:, None, None]
            # The query heads of a group take the place of SDPA's query positions, so that no key is repeated:
            # q [B, N, H] -> [B, G, N / G, H], keys and values [B, G, seen, H].
            groups = k.shape[1]
            head_dim = q.shape[2]
            grouped_q = q.reshape(count, groups, -1, head_dim)
            seen_keys = keys[:count, :, :seen]
            seen_values = values[:count, :, :seen]
            context = attend_to_visible(
                grouped_q, seen_keys, seen_values, visible, module.scores
            )
            return context.flatten(1, 2)

        return bounds, store_and_look_back

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Drop a sequence and erase it: the last one in use moves into its slot.

        Erased with zeros, because a masked product with a NaN that an earlier sequence
        left would still be NaN.
        """
        lengths = self.lengths
        last = len(lengths) - 1
        # Both slots are zero after the longer of the two sequences.
        longer = max(lengths[slot], lengths[last])
        for cached in self._all_tensors():
            used = cached[:, :, :longer]
            if slot != last:
                used[slot] = used[last]
            used[last] = 0
        lengths[slot] = lengths[last]
        lengths.pop()

    @torch.inference_mode()
    def reorder(self, sources: Sequence[int]) -> None:
        """Move the sequence of slot ``sources[i]`` to slot i; a sequence may be copied to several slots, or dropped."""
        target_slots: list[int] = []
        source_slots: list[int] = []
        for slot, source in enumerate(sources):
            if slot != source:
                target_slots.append(slot)
                source_slots.append(source)
        if target_slots:
            longest = max(self.lengths)
            for cached in self._all_tensors():
                used = cached[:, :, :longest]
                # Indexing with a list copies first, so that no move reads what another
                # one wrote.
                used[target_slots] = used[source_slots]
        self.lengths = [self.lengths[source] for source in sources]

    def can_admit(self, lengths: Sequence[int]) -> bool:
        """Return whether prompts of these lengths find room in free slots: a slot has room for any."""
        return len(self.lengths) + len(lengths) <= self.slots

    def shortage(self) -> int:
        """Return how much room is missing for the next token of all sequences: none, each has its slot."""
        return 0

    def size_in_bytes(self) -> int:
        """Return the memory that this rank's cache occupies."""
        return sum(
            tensor.numel() * tensor.element_size() for tensor in self._all_tensors()
        )

    def _all_tensors(self) -> Iterator[Tensor]:
        return chain.from_iterable(self._layers.values())

    def _tensors(self, module: Attention, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer; zeros at first, since masked uninitialized memory could be NaN.

        Args:
            like: [T, G, H], of the wanted type and device.
        """
        layer = module.layer
        if layer not in self._layers:
            tokens = min(self.context_length, module.window or self.context_length)
            shape = (self.slots, like.shape[1], tokens, like.shape[2])
            self._layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[layer]


def bounds_of_prompts(
    lengths: Sequence[int],
    device: torch.device,
) -> SequenceBounds:
    """Return the bounds of whole prompts, packed one after the other."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    longest = max(lengths)
    return SequenceBounds(
        positions.to(device),
        cu_seqlens.to(device),
        longest,
    )


def _store_sequence(cached: Tensor, sequence: Tensor) -> None:
    """Write a sequence [length, G, H] into its slot [G, C, H], or of a longer one the last C tokens.

    Position p goes to row p mod C: with C = 4, positions 3 to 6 to rows 3, 0, 1 and 2.
    """
    length = len(sequence)
    capacity = cached.shape[1]
    if length <= capacity:
        cached[:, :length] = sequence.transpose(0, 1)
        return
    first_kept = length - capacity
    positions = torch.arange(first_kept, length, device=cached.device)
    rows = positions % capacity
    kept = sequence[positions]
    cached[:, rows] = kept.transpose(0, 1)
