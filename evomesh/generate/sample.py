"""Choose the next token from logits.

Shapes: B requests, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evomesh.generate.options import SamplingParams


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits [V] with those of the ids in ``seen`` lowered (int64; a repeated id counts once)."""
    if penalty == 1.0:
        return logits
    of_seen = logits[seen]
    lowered = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
    return logits.index_put((seen,), lowered)


def candidates(
    logits: Tensor,
    sampling: SamplingParams,
    keep: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the tokens that top-k, top-p and min-p leave: ids [K], and their logits [K] over the temperature.

    Args:
        logits: [V].
        keep: at least this many tokens remain, whatever the settings.
    """
    logits = logits / sampling.temperature
    ids = torch.arange(len(logits), device=logits.device)

    # top-k: the k largest logits
    if 0 < sampling.top_k < len(logits):
        logits, ids = logits.topk(max(sampling.top_k, keep))

    # top-p: in descending order, every token before which less than p of the probability is reached
    if sampling.top_p < 1:
        order = logits.sort(descending=True, stable=True)
        logits = order.values
        ids = ids[order.indices]
        probability = logits.softmax(-1)
        before = probability.cumsum(-1) - probability
        remaining = before < sampling.top_p
        remaining[:keep] = True
        logits = logits[remaining]
        ids = ids[remaining]

    # min-p: every token at least this fraction as probable as the top one
    if sampling.min_p > 0:
        probability = logits.softmax(-1)
        threshold = sampling.min_p * probability.max()
        remaining = probability >= threshold
        kept = min(keep, len(probability))
        remaining[probability.topk(kept).indices] = True
        logits = logits[remaining]
        ids = ids[remaining]
    return ids, logits


class TokenSampler:
    """Chooses the tokens of one request; they depend on ``stream`` = (seed, request) and nothing else in the batch."""

    def __init__(self, sampling: SamplingParams, stream: tuple[int, int]) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(stream)

    def next_token(self, logits: Tensor) -> int:
        """Return the next token for logits [V]; unless greedy, this takes one uniform number from the stream."""
        if self.sampling.greedy:
            return int(logits.argmax())
        # On the CPU and in float64, so that a seed gives the same tokens on every device.
        precise = logits.cpu().double()
        ids, kept = candidates(precise, self.sampling)

        # Inverse transform sampling: the first token whose cumulative probability exceeds a uniform number.
        probability = kept.softmax(-1)
        cumulative = probability.cumsum(-1)
        total = float(cumulative[-1])
        threshold = self._random.random() * total
        index = int(torch.searchsorted(cumulative, threshold, right=True))
        last = len(ids) - 1
        chosen = ids[min(index, last)]  # rounding may lead beyond the last
        return int(chosen)


def top_logprobs(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of ``token`` under logits [V], and (id, log-probability) of the ``count`` best."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(count, len(logprobs)))
    best_ids = best.indices.tolist()
    best_logprobs = best.values.tolist()
    return float(logprobs[token]), list(zip(best_ids, best_logprobs, strict=True))


def argmax_suffices(samplings: Sequence[SamplingParams]) -> bool:
    """Return whether one argmax over all rows gives the next token of every request."""
    return all(s.greedy and s.repetition_penalty == 1.0 and s.logprobs < 0 for s in samplings)
