"""From logits to the next token.

Shapes: B requests, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evomesh.generate.options import SamplingParams


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [V] with those of the ids in ``seen`` (int64, repeats count once) made less likely."""
    if penalty == 1.0:
        return logits
    known = logits[seen]
    return logits.index_put((seen,), torch.where(known < 0, known * penalty, known / penalty))


def candidates(logits: Tensor, sampling: SamplingParams, keep: int = 1) -> tuple[Tensor, Tensor]:
    """Logits [V] -> (ids [K], logits [K] over the temperature) of the tokens that top-k, top-p and min-p leave.

    Args:
        keep: at least so many tokens stay, whatever the cuts say.
    """
    logits = logits / sampling.temperature
    ids = torch.arange(len(logits), device=logits.device)
    if 0 < sampling.top_k < len(logits):
        logits, ids = logits.topk(max(sampling.top_k, keep))
    if sampling.top_p < 1:
        order = logits.sort(descending=True, stable=True)
        logits, ids = order.values, ids[order.indices]
        share = logits.softmax(-1)
        left = share.cumsum(-1) - share < sampling.top_p
        left[:keep] = True
        logits, ids = logits[left], ids[left]
    if sampling.min_p > 0:
        likely = logits.softmax(-1)
        left = likely >= sampling.min_p * likely.max()
        left[likely.topk(min(keep, len(likely))).indices] = True
        logits, ids = logits[left], ids[left]
    return ids, logits


class TokenSampler:
    """Draws the tokens of one request: a function of ``stream`` = (seed, request) and of nothing else in the batch."""

    def __init__(self, sampling: SamplingParams, stream: tuple[int, int]) -> None:
        self.sampling = sampling
        self._draws = np.random.default_rng(stream)

    def next(self, logits: Tensor) -> int:
        """The next token for logits [V]; every draw takes one uniform number from the stream."""
        if self.sampling.greedy:
            return int(logits.argmax())
        # On the CPU and in float64, so that a seed means the same tokens on every device.
        ids, logits = candidates(logits.cpu().double(), self.sampling)
        reached = logits.softmax(-1).cumsum(-1)
        place = torch.searchsorted(reached, self._draws.random() * float(reached[-1]), right=True)
        return int(ids[min(int(place), len(ids) - 1)])


def report(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of ``token`` under logits [V], and (id, log-probability) of the ``top`` likeliest tokens."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    return float(logprobs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def plain_greedy(samplings: Sequence[SamplingParams]) -> bool:
    """Whether one argmax over all rows answers all requests."""
    return all(s.greedy and s.repetition_penalty == 1.0 and s.logprobs < 0 for s in samplings)
