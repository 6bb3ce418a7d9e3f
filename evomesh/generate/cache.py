"""Keys and values of the tokens seen so far, kept so that each new token costs one row of attention.

Shapes: B sequences, C capacity in tokens, T packed tokens of one call, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evomesh.layers.attention import Documents, attend
from evomesh.layers.documents import whole


class KeyValueCache:
    """Rotated keys and values of B sequences of unequal length, one pair of [B, C, G, H] tensors a layer.

    ``attend`` is what ``Decoder.forward`` takes as its attention: the first call of a layer holds whole prompts as
    packed documents, every later one exactly one token of each sequence.

    Args:
        lengths: tokens of each prompt.
        capacity: most tokens a sequence may reach, prompt included.
    """

    def __init__(self, lengths: list[int], capacity: int) -> None:
        self.lengths = list(lengths)
        self.capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def documents(self, device: torch.device) -> Documents:
        """Positions of the next call's tokens: whole prompts at first, then one token a sequence."""
        if not self._layers:
            parts = [whole(length, device=device).position_ids for length in self.lengths]
            bounds = torch.tensor([0, *self.lengths]).cumsum(0).to(device, torch.int32)
            return Documents(torch.cat(parts), bounds, max(self.lengths))
        positions = torch.tensor(self.lengths, device=device)
        return Documents(positions, torch.arange(len(positions) + 1, dtype=torch.int32, device=device), 1)

    def advance(self) -> None:
        """After one single-token call: every sequence is one token longer."""
        self.lengths = [length + 1 for length in self.lengths]

    def keep(self, rows: list[int]) -> None:
        """Drops all sequences but ``rows``, which take the places 0, 1, ..."""
        self.lengths = [self.lengths[row] for row in rows]
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
        """q [T, N, H], k and v [T, G, H] -> [T, N, H]."""
        if layer not in self._layers:
            self._fill(layer, k, v)
            prompt: Tensor = attend(layer, q, k, v, docs)
            return prompt
        keys, values = self._layers[layer]
        rows = torch.arange(len(q), device=q.device)
        keys[rows, docs.position_ids], values[rows, docs.position_ids] = k, v
        longest = max(self.lengths) + 1
        seen = torch.arange(longest, device=q.device) <= docs.position_ids[:, None]  # [B, longest]
        out: Tensor = F.scaled_dot_product_attention(
            q[:, :, None],
            keys[:, :longest].transpose(1, 2),
            values[:, :longest].transpose(1, 2),
            attn_mask=seen[:, None, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[:, :, 0]

    def _fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        room = (len(self.lengths), self.capacity, *k.shape[1:])
        # Zeros, since a masked product with uninitialised memory could still be NaN.
        keys, values = k.new_zeros(room), v.new_zeros(room)
        for row, (key, value) in enumerate(
            zip(torch.split(k, self.lengths), torch.split(v, self.lengths), strict=True)
        ):
            keys[row, : len(key)], values[row, : len(value)] = key, value
        self._layers[layer] = (keys, values)
