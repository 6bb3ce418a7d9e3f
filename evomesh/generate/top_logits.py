"""Choose the tokens of all requests of a step from one copy of their largest logits.

The rules are those of ``sample``, which have the whole row on the host. Here the device
ranks the K largest logits of every row and adds up the weights of all, and the host cuts
and draws among those K. Sums are rounded differently, so that a draw counts only where no
rounding could change it. Rows without one are copied whole and drawn by ``sample``, with
the same random number.

Shapes: B requests, V vocabulary, K largest logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evomesh.generate.options import SamplingParams
from evomesh.generate.sample import TokenSampler, draw_token

TOP = 1024  # logits of each row that are copied
# Far above the relative error of a sum of a million float64 weights, 1e-10 at most, and
# far below what would send a noticeable share of the draws to the whole row.
ROUNDING = 1e-9
ID_BITS = 32
LARGEST_ID = 2**ID_BITS - 1
MAGNITUDE_BITS = 2**31 - 1
Weights: TypeAlias = npt.NDArray[np.float64]


def choose_tokens(samplers: Sequence[TokenSampler], logits: Tensor) -> list[int]:
    """Return the next token of each request by its row of the logits [B, V].

    On the CPU there is nothing to copy, and ranking K of them takes longer than the
    histogram of ``sample``.
    """
    if logits.is_cpu:
        rows = zip(samplers, logits, strict=True)
        return [sampler.next_token(row) for sampler, row in rows]
    return choose_from_top(samplers, logits)


def choose_from_top(samplers: Sequence[TokenSampler], logits: Tensor) -> list[int]:
    """Return what ``choose_tokens`` does, with one copy to the host unless rows are undecided."""
    samplings = [sampler.sampling for sampler in samplers]
    packed = pack_top(logits, samplings)
    on_host = packed.cpu()
    vocab_size = logits.shape[1]
    uniforms: list[float] = []
    tokens: dict[int, int] = {}
    undecided: list[int] = []
    for row, sampler in enumerate(samplers):
        uniform = sampler.uniform()
        uniforms.append(uniform)
        sampling = samplings[row]
        top = TopLogits.unpack(on_host[row], sampling, vocab_size)
        token = top.draw(sampling, uniform)
        if token is None:
            undecided.append(row)
        else:
            tokens[row] = token

    if undecided:
        whole_rows = _copy_rows(logits, undecided)
        for row, whole in zip(undecided, whole_rows, strict=True):
            sampling = samplings[row]
            uniform = uniforms[row]
            tokens[row] = draw_token(whole, sampling, uniform)
    return [tokens[row] for row in range(len(samplers))]


def _copy_rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Return these rows of logits [B, V] on the host."""
    chosen = [logits[row] for row in rows]
    return torch.stack(chosen).cpu()


def pack_top(
    logits: Tensor,
    samplings: Sequence[SamplingParams],
) -> Tensor:
    """Return, on the device of ``logits`` [B, V], what the host needs of them, [B, 2 K + 1] float64.

    First the K largest logits, then their ids, then the sum of all V weights.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wide = logits.to(dtype)
    vocab_size = wide.shape[1]
    count = min(TOP, vocab_size)
    ids = _largest(wide, count)
    values = wide.gather(1, ids)
    totals = _total_weights(wide, samplings)
    parts = [values, ids, totals]
    return torch.cat(
        [part.double() for part in parts],
        dim=1,
    )


def _total_weights(
    logits: Tensor,
    samplings: Sequence[SamplingParams],
) -> Tensor:
    """Return the sum over V of exp(-gap / temperature) for logits [B, V], [B, 1] float64."""
    divisors = [_temperature(sampling) for sampling in samplings]
    temperatures = torch.tensor(divisors, dtype=torch.float64)
    temperatures = temperatures.unsqueeze(1)
    temperatures = temperatures.to(
        logits.device,
        non_blocking=True,
    )
    largest = logits.amax(
        dim=1,
        keepdim=True,
    )
    weights = logits.double() - largest
    weights.div_(temperatures)
    weights.exp_()
    return weights.sum(1, keepdim=True)


def _temperature(sampling: SamplingParams) -> float:
    """Return what logits are divided by; a greedy request has no weights, and any number will do."""
    return 1.0 if sampling.greedy else sampling.temperature


def _largest(logits: Tensor, count: int) -> Tensor:
    """Return the ids of the largest logits [B, count], of equal ones the lower id first."""
    if logits.dtype == torch.float32:
        keys = _ranking_keys(logits)
        largest = keys.topk(count, dim=1)
        counted_backwards = largest.values & LARGEST_ID
        ids: Tensor = LARGEST_ID - counted_backwards
        return ids
    ranked = logits.sort(
        dim=1,
        descending=True,
        stable=True,
    )
    indices = ranked.indices
    return indices[:, :count]


def _ranking_keys(logits: Tensor) -> Tensor:
    """Return int64 keys that rank float32 logits [B, V] as a stable sort does.

    ``topk`` promises no order of equal values. So keys differ: the bits of the logit, as an
    integer of the same order, and below them the id counted backwards.
    """
    positive_zero = logits + 0.0
    bits = positive_zero.view(torch.int32)
    # A negative float with larger magnitude bits is smaller.
    flipped = bits ^ MAGNITUDE_BITS
    ordered = torch.where(bits < 0, flipped, bits)
    upper = ordered.long() << ID_BITS
    vocab_size = logits.shape[1]
    ids = torch.arange(
        vocab_size,
        device=logits.device,
    )
    counted_backwards = LARGEST_ID - ids
    keys: Tensor = upper + counted_backwards
    return keys


@dataclass(frozen=True)
class TopLogits:
    """The K largest logits of a row in order.

    Attributes:
        ids: [K]
        weights: [K], probabilities up to a common factor; that of the first is 1.
        total: the sum of the weights of all V tokens.
        is_finite: False for a row of a broken model.
    """

    ids: npt.NDArray[np.int64]
    weights: Weights
    total: float
    vocab_size: int
    is_finite: bool

    @classmethod
    def unpack(
        cls, packed: Tensor, sampling: SamplingParams, vocab_size: int
    ) -> TopLogits:
        """Return a row of ``pack_top``, copied to the host."""
        numbers: Weights = packed.numpy()
        count = len(numbers) // 2
        values = numbers[:count]
        ids = numbers[count:-1].astype(np.int64)
        total = float(numbers[-1])
        first = float(values[0])
        is_finite = math.isfinite(first) and math.isfinite(total)
        weights = np.zeros(count)
        if is_finite:
            gaps = values - first
            scaled = gaps / _temperature(sampling)
            weights = np.exp(scaled)
        return cls(ids, weights, total, vocab_size, is_finite)

    @property
    def is_whole(self) -> bool:
        return len(self.ids) == self.vocab_size

    def draw(self, sampling: SamplingParams, uniform: float) -> int | None:
        """Return the token that ``draw_token`` draws from the whole row; None if these logits do not tell."""
        if not self.is_finite:
            return None
        if sampling.greedy:
            return int(self.ids[0])
        sums = np.cumsum(self.weights)
        count = self._remaining(sampling, sums)
        if count is None:
            return None
        remaining_weight = float(sums[count - 1]) if count else self.total
        index = certain_count(sums, uniform * remaining_weight)
        if index is None or index >= (count or len(sums)):
            return None
        return int(self.ids[index])

    def _remaining(self, sampling: SamplingParams, sums: Weights) -> int | None:
        """Return how many tokens top-k, top-p and min-p leave: 0 for all V, None if these logits do not tell."""
        known = len(sums)
        count = known if self.is_whole else 0
        if 0 < sampling.top_k < self.vocab_size:
            if sampling.top_k > known:
                return None
            count = sampling.top_k
        if sampling.top_p < 1:
            total = float(sums[count - 1]) if count else self.total
            enough = self._reaching(sampling.top_p * total, sums)
            if enough is None:
                return None
            count = min(count or known, enough)
        if sampling.min_p > 0:
            probable = self._probable(sampling.min_p)
            if probable is None:
                return None
            count = min(count or self.vocab_size, probable)
            if count > known:
                return None
        return count

    def _reaching(self, weight: float, sums: Weights) -> int | None:
        """Return the length of the shortest beginning whose weights reach ``weight``."""
        shorter = certain_count(sums, weight)
        if shorter is None or shorter == len(sums):
            return None
        return shorter + 1

    def _probable(self, share: float) -> int | None:
        """Return how many tokens are at least ``share`` as probable as the first; V if more than K may be."""
        # Equal to the first one without rounding, and so is their weight of 1.
        is_equal = self.weights == 1
        equal = int(np.count_nonzero(is_equal))
        unequal = self.weights[equal:]
        ascending = unequal[::-1]
        below = certain_count(ascending, share)
        if below is None:
            return None
        if below == 0 and not self.is_whole:
            return self.vocab_size
        return len(self.weights) - below


def certain_count(ascending: Weights, bound: float) -> int | None:
    """Return how many of the ascending values are below ``bound``; None if one is so close that rounding decides."""
    below = np.searchsorted(ascending, bound * (1 - ROUNDING), side="left")
    not_above = np.searchsorted(ascending, bound * (1 + ROUNDING), side="right")
    return int(below) if below == not_above else None
