"""Dropout whose masks are numbers of a counter: the same in every layout, after a resume, and when recomputed.

Shapes: T packed tokens of the whole sequence, S of them on this rank, D columns.

The generator is Philox 4x32 with ten rounds (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", 2011): four words of 32 bits are a function of a key and a counter, so
nothing has to be drawn in order and no state has to be kept.

    key        seed, step
    counter    token (two words, the second with the head), column // 4, layer and site
    result     the words of columns 4 c .. 4 c + 3

Torch has no unsigned 64-bit products: a product of two 32-bit words wraps in int64, with
the right bits, so both halves are taken by masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
WORDS = 4  # of one counter

# Where in a layer a mask acts; part of the counter.
EMBEDDING = 0
ATTENTION_OUTPUT = 1
FEED_FORWARD_OUTPUT = 2
ATTENTION_PROBABILITY = 3
SITES = 4
HEAD_SHIFT = 16  # a token's upper word has room for the head above its own 16 bits


# Not frozen, as SequenceBounds: torch 2.11's compiler inspects frozen dataclasses.
@dataclass(eq=False)
class MaskNumbers:
    """Numbers from which the masks of one pack are drawn. Treat it as immutable.

    Tensors, because a compiled block specializes on each Python number that it reads.

    Attributes:
        key: [2] int64, seed and step.
        tokens: [T] int64, number of each token in the step, over all packs and ranks.
        layer: scalar int64, global index of the layer that draws.
    """

    key: Tensor
    tokens: Tensor
    layer: Tensor

    @classmethod
    def of_pack(cls, key: Tensor, tokens: Tensor) -> MaskNumbers:
        return cls(key, tokens, torch.zeros((), dtype=torch.int64, device=key.device))

    def at_layer(self, layer: int) -> MaskNumbers:
        return MaskNumbers(self.key, self.tokens, torch.full_like(self.layer, layer))

    def shard(self, rows: int, rank: int) -> MaskNumbers:
        """Return the numbers of the ``rows`` tokens that rank ``rank`` of the tensor axis holds."""
        tokens = self.tokens.narrow(0, rank * rows, rows)
        return MaskNumbers(self.key, tokens, self.layer)

    def words(self, tokens: Tensor, columns: Tensor, site: int, head: Tensor) -> Tensor:
        """Return one 32-bit word for each token and column.

        Args:
            tokens: numbers of tokens, [..., 1].
            columns: C consecutive columns / 4, [C / 4].
            head: broadcasts with ``tokens``; 0 where there is none.
        Returns:
            [..., C] int64.
        """
        upper = (tokens >> 32) | (head << HEAD_SHIFT)
        place = self.layer * SITES + site
        counter = (tokens & WORD, upper & WORD, columns, place)
        words = philox(self.key, counter)
        return torch.stack(words, dim=-1).flatten(-2)


def philox(key: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the four words of each counter.

    Args:
        key: [2] int64, words of 32 bits.
        counter: four int64 tensors that broadcast together, words of 32 bits; the first rounds stay as small as they.
    """
    low_key, high_key = (key & WORD).unbind()
    low_step, high_step = KEY_STEPS
    low_multiplier, high_multiplier = MULTIPLIERS
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # The upper word of each product meets a word of the other half and of the key;
        # its lower word moves by one place.
        low = c0 * low_multiplier
        high = c2 * high_multiplier
        c0 = _upper(high) ^ c1 ^ low_key
        c1 = _lower(high)
        c2 = _upper(low) ^ c3 ^ high_key
        c3 = _lower(low)
        low_key = _lower(low_key + low_step)
        high_key = _lower(high_key + high_step)
    return c0, c1, c2, c3


def _upper(product: Tensor) -> Tensor:
    """Return the upper word of a 64-bit product; the shift of a negative int64 fills with ones, which are masked."""
    return (product >> 32) & WORD


def _lower(product: Tensor) -> Tensor:
    return product & WORD


def drop_columns(
    x: Tensor,
    rate: float,
    numbers: MaskNumbers | None,
    site: int,
    rank: int,
) -> Tensor:
    """Zero each element of ``x`` [S, D] with probability ``rate`` and scale the others by 1 / (1 - rate).

    Args:
        numbers: of the whole sequence [T]; None outside training, which returns ``x`` itself.
        rank: which shard of the sequence ``x`` is, where S is less than T.
    """
    if not rate or numbers is None:
        return x
    rows, width = x.shape
    if rows != len(numbers.tokens):
        numbers = numbers.shard(rows, rank)
    # A counter gives the words of four columns; the last one may have some to spare.
    counters = math.ceil(width / WORDS)
    columns = torch.arange(counters, device=x.device)
    tokens = numbers.tokens[:, None]
    no_head = torch.zeros_like(tokens)
    words = numbers.words(tokens, columns, site, no_head)
    return keep(x, words[:, :width], rate)


def drop_probabilities(
    probabilities: Tensor,
    rate: float,
    numbers: MaskNumbers,
    *,
    queries: Tensor,
    first_key: int,
    first_head: int,
) -> Tensor:
    """Drop attention probabilities [N, Q, K] by query token, head and key.

    Args:
        queries: [Q] int64, numbers of the query tokens.
        first_key: position of the first key in its segment.
        first_head: global index of the first of the N heads.
    """
    heads, _, num_keys = probabilities.shape
    device = probabilities.device
    first_group = first_key // WORDS
    last_group = (first_key + num_keys - 1) // WORDS
    groups = torch.arange(first_group, last_group + 1, device=device)
    head = torch.arange(first_head, first_head + heads, device=device)
    words = numbers.words(
        queries[:, None],
        groups,
        ATTENTION_PROBABILITY,
        head[:, None, None],
    )
    skipped = first_key - first_group * WORDS
    return keep(probabilities, words[..., skipped : skipped + num_keys], rate)


def keep(x: Tensor, words: Tensor, rate: float) -> Tensor:
    """Return ``x`` / (1 - rate) where the 32-bit word is at least ``rate`` of all words, else 0."""
    threshold = round(rate * 2**32)
    return torch.where(words >= threshold, x * (1 / (1 - rate)), 0.0)
