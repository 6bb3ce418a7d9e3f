"""Choose the next token from logits.

The gap of a token is the distance of its logit from the largest one. Top-k, top-p and
min-p all keep a beginning of the order by gap (equal gaps: lower id first), so that
none of them needs the whole vocabulary sorted.

Shapes: B requests, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evomesh.generate.options import SamplingParams

BINS = 4096
BINS_PER_UNIT = 64  # of a gap over the temperature; all gaps beyond BINS / BINS_PER_UNIT = 64 share the last bin
Ids: TypeAlias = npt.NDArray[np.int64]
TokenLogprob: TypeAlias = tuple[int, float]
Summand = TypeVar("Summand", np.int64, np.float64)
Place = tuple[int, int]
AFTER_ALL: Place = (BINS, 0)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits [V] with those of the ids in ``seen`` lowered (int64; a repeated id counts once)."""
    if penalty == 1.0:
        return logits
    of_seen = logits[seen]
    lowered = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
    return logits.index_put((seen,), lowered)


class RankedTokens:
    """All tokens in the order by gap, of which no more is sorted than is asked for.

    A histogram of the gaps counts the tokens of each bin and adds up their weights;
    sorting is for the tokens of a single bin. A place in the order is a pair (bin, rank
    inside the bin), so that places compare like the gaps there.

    Args:
        logits: [V], on the CPU.
        temperature: above 0.

    Attributes:
        weights: [V], probabilities up to a common factor; that of the first token is 1.
    """

    def __init__(self, logits: Tensor, temperature: float) -> None:
        logits, top = _with_top(logits)
        self._logits = logits.numpy()
        self._bins = _bins_of_gaps(logits, top, temperature)
        self._sorted_bins: dict[int, Ids] = {}
        self.weights = _weights_of_gaps(logits, top, temperature)

    @cached_property
    def _weight_in_bin(self) -> npt.NDArray[Any]:
        return np.bincount(self._bins, self.weights, minlength=BINS)

    @cached_property
    def _weight_before(self) -> npt.NDArray[np.float64]:
        return _sums_before(self._weight_in_bin)

    @cached_property
    def _count_before(self) -> npt.NDArray[np.int64]:
        counts = np.bincount(self._bins, minlength=BINS)
        return _sums_before(counts)

    def after_count(self, count: int) -> Place:
        """Return the place after the first ``count`` tokens."""
        bin_ = int(np.searchsorted(self._count_before, count)) - 1
        return bin_, count - int(self._count_before[bin_])

    def after_weight(self, weight: float) -> Place:
        """Return the place after the shortest beginning whose weights reach ``weight``, which is above 0."""
        bin_ = int(np.searchsorted(self._weight_before, weight)) - 1
        weights = self.weights[self._sorted(bin_)]
        before = self._weight_before[bin_] + np.cumsum(weights) - weights
        return bin_, int(np.count_nonzero(before < weight))

    def weight_before(self, place: Place) -> float:
        """Return the summed weights of the tokens before a place."""
        bin_, rank = place
        if place == AFTER_ALL:
            return float(self._weight_in_bin.sum())
        members = self._sorted(bin_)[:rank]
        return float(self._weight_before[bin_] + self.weights[members].sum())

    def ids_before(self, place: Place) -> npt.NDArray[np.int64]:
        """Return the ids of the tokens before a place [K], in any order."""
        bin_, rank = place
        whole_bins = np.flatnonzero(self._bins < bin_)
        return np.concatenate([whole_bins, self._sorted(bin_)[:rank]])

    def find(self, weight: float, end: Place) -> int:
        """Return the first token whose cumulative weight exceeds ``weight``, or else the last one before ``end``."""
        end_bin, end_rank = end
        # 1. The last bin before which no more than this weight is summed up.
        bins_not_above = _count_not_above(weight, self._weight_before)
        bin_ = min(bins_not_above - 1, end_bin)
        members = self._sorted(bin_)
        if bin_ == end_bin:
            members = members[:end_rank]

        # 2. The token in it: cumulative weights 0.5, 0.75 and 0.875 give the second token for a weight of 0.5.
        weights = self.weights[members]
        in_bin = np.cumsum(weights)
        cumulative = self._weight_before[bin_] + in_bin
        index = _count_not_above(weight, cumulative)
        # Rounding may lead beyond the last one.
        last = len(members) - 1
        index = min(index, last)
        return int(members[index])

    def _sorted(self, bin_: int) -> npt.NDArray[np.int64]:
        """Return the ids of the tokens of one bin, in order."""
        if bin_ not in self._sorted_bins:
            members = np.flatnonzero(self._bins == bin_)
            order = np.argsort(-self._logits[members], kind="stable")
            self._sorted_bins[bin_] = members[order]
        return self._sorted_bins[bin_]


def candidates_end(
    ranked: RankedTokens,
    sampling: SamplingParams,
    keep: int = 1,
) -> Place:
    """Return the place after the tokens that top-k, top-p and min-p leave.

    Args:
        keep: at least this many tokens remain, whatever the settings.
    """
    vocab_size = len(ranked.weights)
    keep = min(keep, vocab_size)
    end = AFTER_ALL

    # top-k: the k largest logits
    if 0 < sampling.top_k < vocab_size:
        count = max(sampling.top_k, keep)
        end = ranked.after_count(count)

    # top-p: every token before which less than p of the probability is reached. With
    # probabilities 0.5, 0.3 and 0.2 and p = 0.6, the first two. The probability is that
    # of the tokens that top-k left.
    if sampling.top_p < 1:
        total = ranked.weight_before(end)
        enough = ranked.after_weight(sampling.top_p * total)
        end = min(end, enough)

    # min-p: every token at least this fraction as probable as the top one, whose weight
    # is 1
    if sampling.min_p > 0:
        is_probable = ranked.weights >= sampling.min_p
        count = int(np.count_nonzero(is_probable))
        end = min(end, ranked.after_count(count))

    if keep > 1:
        end = max(end, ranked.after_count(keep))
    return end


def candidates(
    logits: Tensor,
    sampling: SamplingParams,
    keep: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the tokens that top-k, top-p and min-p leave: ids [K], and their logits [K] over the temperature.

    Args:
        logits: [V], on the CPU.
        keep: at least this many tokens remain, whatever the settings.
    """
    ranked = RankedTokens(logits, sampling.temperature)
    end = candidates_end(ranked, sampling, keep)
    ids = torch.from_numpy(ranked.ids_before(end))
    return ids, logits[ids] / sampling.temperature


class TokenSampler:
    """Chooses the tokens of one request; they depend on ``stream`` = (seed, request) and nothing else in the batch."""

    def __init__(self, sampling: SamplingParams, stream: tuple[int, int]) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(stream)

    def next_token(self, logits: Tensor) -> int:
        """Return the next token for logits [V]; unless greedy, this takes one uniform number from the stream."""
        return draw_token(logits.cpu(), self.sampling, self.uniform())

    def uniform(self) -> float:
        """Return the random number of the next token, from 0 to 1, and take it from the stream unless greedy."""
        return 0.0 if self.sampling.greedy else self._random.random()


def draw_token(logits: Tensor, sampling: SamplingParams, uniform: float) -> int:
    """Return the first token of logits [V] on the CPU whose cumulative probability exceeds ``uniform``.

    That is inverse transform sampling. Greedy requests get the most probable token.
    """
    if sampling.greedy:
        return int(logits.argmax())
    ranked = RankedTokens(logits, sampling.temperature)
    end = candidates_end(ranked, sampling)
    threshold = uniform * ranked.weight_before(end)
    return ranked.find(threshold, end)


def top_logprobs(
    logits: Tensor,
    tokens: Sequence[int],
    count: int,
) -> list[tuple[float, list[TokenLogprob]]]:
    """Return the log-probability of each row's token, and the ``count`` best tokens of the row with theirs.

    Args:
        logits: [B, V].
        tokens: one for each row.
    """
    logprobs = logits.log_softmax(-1)
    count = min(count, logprobs.shape[1])
    best = logprobs.topk(count)
    columns = torch.tensor(tokens).unsqueeze(1)
    columns = columns.to(
        logits.device,
        non_blocking=True,
    )
    own = logprobs.gather(1, columns)
    # In one tensor, for one copy to the host.
    parts = [own, best.values, best.indices]
    rows = torch.cat(
        [part.double() for part in parts],
        dim=1,
    )
    answers = []
    for own_logprob, *others in rows.tolist():
        best_logprobs = others[:count]
        ids = map(int, others[count:])
        top = list(zip(ids, best_logprobs, strict=True))
        answers.append((own_logprob, top))
    return answers


def _with_top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, at least float32, and the largest of them."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    top = logits.max()
    if not top.isfinite():
        # The model is broken. Give it any tokens, so that the other requests of the
        # batch get theirs.
        logits = torch.zeros_like(logits)
        top = logits[0]
    return logits, top


def _sums_before(summands: npt.NDArray[Summand]) -> npt.NDArray[Summand]:
    """Return the sum of all summands before each one: 3, 1 and 2 give 0, 3 and 4."""
    sums: npt.NDArray[Summand] = np.cumsum(summands) - summands
    return sums


def _bins_of_gaps(logits: Tensor, top: Tensor, temperature: float) -> Ids:
    """Return the bin of each token [V].

    A bin is 1/64 wide in units of gap over temperature: at temperature 2 a gap of 1 falls
    into bin 32.
    """
    bins = top - logits
    bins.mul_(BINS_PER_UNIT / temperature)
    bins.clamp_(max=BINS - 1)
    numbers: Ids = bins.long().numpy()
    return numbers


def _weights_of_gaps(
    logits: Tensor, top: Tensor, temperature: float
) -> npt.NDArray[np.float64]:
    """Return exp(-gap / temperature) of each token [V], in float64, so that a seed gives one answer on all devices."""
    weights = logits.double() - top
    weights.div_(temperature)
    weights.exp_()
    values: npt.NDArray[np.float64] = weights.numpy()
    return values


def _count_not_above(bound: float, ascending: npt.NDArray[Any]) -> int:
    """Return how many of the ascending values are not above ``bound``."""
    return int(np.searchsorted(ascending, bound, side="right"))


def argmax_suffices(samplings: Sequence[SamplingParams]) -> bool:
    """Return whether one argmax over all rows gives the next token of every request."""
    return all(
        s.greedy and s.repetition_penalty == 1.0 and s.logprobs < 0 for s in samplings
    )
