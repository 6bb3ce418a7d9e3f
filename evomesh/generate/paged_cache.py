"""The key/value cache in pages: a sequence holds as many as its tokens fill, anywhere in a pool.

    table of a sequence    [4, 1]          its tokens 0 to S - 1 are in page 4, the next S in page 1
    pool of a layer        keys and values, each [1 + pages, S, G, H]

Page 0 belongs to no sequence: rows that only fill up a batch write there. All layers use
the same tables.

Shapes: S tokens of a page, G key/value heads, H head dim, T packed tokens of one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomesh.generate.cache import bounds_of_prompts
from evomesh.layers.attention import (
    Attention,
    AttentionFunction,
    SequenceBounds,
    attend,
)

PAGE_SIZE = 256  # torch's kernel takes multiples of it


class PagedCache:
    """Rotated keys and values of up to ``slots`` sequences, in pages that are taken and returned.

    Sequences in use occupy rows 0 .. B - 1, as in ``KeyValueCache``. Before each call of the
    model comes ``prefill`` (whole new sequences, packed) or ``extend`` (one token of each
    sequence), which take pages.

    Args:
        context_length: maximum number of tokens of one sequence.
        pages: of the pool; None: enough for ``slots`` sequences of the context length.

    Attributes:
        lengths: tokens of each sequence.
        tables: pages of each sequence, in the order of its tokens.
    """

    def __init__(
        self,
        slots: int,
        context_length: int,
        *,
        page_size: int = PAGE_SIZE,
        pages: int | None = None,
    ) -> None:
        self.slots = slots
        self.context_length = context_length
        self.page_size = page_size
        self.pages_per_row = self.pages_for(context_length)
        self.pages = slots * self.pages_per_row if pages is None else pages
        if self.pages < self.pages_per_row:
            raise ValueError(
                f"{self.pages} pages of {page_size} tokens hold no sequence of {context_length} tokens"
            )
        self.lengths: list[int] = []
        self.tables: list[list[int]] = []
        # The lowest page last, which is taken first.
        self._free = list(range(self.pages, 0, -1))
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}

    def pages_for(self, length: int) -> int:
        """Return how many pages a sequence of this length fills, the last one in part."""
        return -(-length // self.page_size)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def can_admit(self, lengths: Sequence[int]) -> bool:
        """Return whether prompts of these lengths, and their next tokens, find room.

        One page stays free for each sequence in use that can still grow, so that a prompt
        that has just been read is not what makes room.
        """
        if len(self.lengths) + len(lengths) > self.slots:
            return False
        needed = sum(self.pages_for(length + 1) for length in lengths)
        growing = sum(len(table) < self.pages_per_row for table in self.tables)
        return needed + growing <= self.free_pages

    def shortage(self) -> int:
        """Return how many pages are missing for the next token of all sequences."""
        needed = 0
        for length, table in zip(self.lengths, self.tables, strict=True):
            needed += self.pages_for(length + 1) - len(table)
        return max(needed - self.free_pages, 0)

    def prefill(
        self,
        lengths: Sequence[int],
        device: torch.device,
    ) -> tuple[SequenceBounds, AttentionFunction]:
        """Take pages for prompts of these lengths; the next call of the model has their tokens.

        Raises:
            ValueError: too few free rows or pages, or a prompt longer than the context length.
        """
        needed = sum(self.pages_for(length) for length in lengths)
        rows = len(self.lengths) + len(lengths)
        has_room = rows <= self.slots and needed <= self.free_pages
        if not has_room or max(lengths) > self.context_length:
            raise ValueError(
                f"no room for prompts of {list(lengths)} tokens beside {len(self.lengths)} sequences: the cache "
                f"has {self.slots} rows of {self.context_length} tokens and {self.free_pages} free pages"
            )
        places: list[int] = []
        for length in lengths:
            table = self._take(self.pages_for(length))
            self.lengths.append(length)
            self.tables.append(table)
            places += self._places(table, range(length))
        place_of_token = torch.tensor(places, device=device)  # [T]

        def store_and_attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            bounds: SequenceBounds,
            module: Attention,
        ) -> Tensor:
            self.store(module, k, v, place_of_token)
            out: Tensor = attend(q, k, v, bounds, module)
            return out

        return bounds_of_prompts(lengths, device), store_and_attend

    def extend(self) -> list[int]:
        """Make room for one more token of each sequence, and return its place in the pool.

        Raises:
            ValueError: a sequence has reached the context length, or no page is free.
        """
        if max(self.lengths) >= self.context_length:
            raise ValueError(
                f"a sequence is longer than the cache's {self.context_length} tokens"
            )
        if self.shortage():
            raise ValueError(f"{self.shortage()} pages are missing for the next tokens")
        places: list[int] = []
        for row, table in enumerate(self.tables):
            position = self.lengths[row]
            missing = self.pages_for(position + 1) - len(table)
            table.extend(self._take(missing))
            places += self._places(table, range(position, position + 1))
            self.lengths[row] = position + 1
        return places

    @torch.inference_mode()
    def release(self, row: int) -> None:
        """Return the pages of a sequence to the pool, erased; the last sequence in use moves into its row.

        Erased with zeros, because what an earlier sequence left might be no numbers.
        """
        table = self.tables[row]
        self._erase(table)
        self._free += reversed(table)
        last_table = self.tables.pop()
        last_length = self.lengths.pop()
        if row < len(self.tables):
            self.tables[row] = last_table
            self.lengths[row] = last_length

    def _erase(self, table: list[int]) -> None:
        """Fill pages with zeros in all layers."""
        pools: list[Tensor] = []
        for keys_and_values in self._pools.values():
            pools.extend(keys_and_values)
        if not pools:
            return
        # One copy to the device for all layers.
        device = pools[0].device
        pages = torch.tensor(table, device=device)
        for pool in pools:
            pool.index_fill_(0, pages, 0)

    def store(
        self,
        module: Attention,
        k: Tensor,
        v: Tensor,
        places: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [T, G, H] of a layer to their places [T], and return its pools."""
        pools = self._pools_of(module, k)
        for pool, new in zip(pools, (k, v), strict=True):
            tokens = pool.flatten(0, 1)  # a view: [(1 + pages) S, G, H]
            tokens.index_copy_(0, places, new)
        return pools

    def size_in_bytes(self) -> int:
        """Return the memory that this rank's pools occupy."""
        total = 0
        for pools in self._pools.values():
            for pool in pools:
                total += pool.numel() * pool.element_size()
        return total

    def _pools_of(self, module: Attention, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pools of a layer, for keys and values like those given, [T, G, H]."""
        layer = module.layer
        if layer not in self._pools:
            pages = 1 + self.pages
            shape = (pages, self.page_size, *like.shape[1:])
            self._pools[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._pools[layer]

    def _take(self, count: int) -> list[int]:
        return [self._free.pop() for _ in range(count)]

    def _places(self, table: list[int], positions: range) -> list[int]:
        """Return where the tokens at these positions of a sequence are: S times the page, and the place inside."""
        size = self.page_size
        return [
            table[position // size] * size + position % size for position in positions
        ]
