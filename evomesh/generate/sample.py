"""From logits to the next token.

Shapes: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature scales first, then top-k, then top-p (Holtzman et al., 2020) cut the tail.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens whose probabilities reach p together, the one that crosses p included.
        seed: of the request's own random stream.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1024

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}", expected=expected)


def candidates(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [V] -> probabilities [V] after temperature, top-k and top-p; tokens cut away have probability 0."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        kth = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = probabilities.index_fill(0, order[before >= sampling.top_p], 0.0)
        probabilities = probabilities / probabilities.sum()
    return probabilities


class TokenSampler:
    """One request's stream of draws: a function of (seed, request) and of nothing else in the batch."""

    def __init__(self, sampling: Sampling, request: int = 0) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + request)

    def next(self, logits: Tensor) -> int:
        """The next token for logits [V]."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        # Drawn on the CPU, so that a seed means the same tokens on every device.
        return int(torch.multinomial(candidates(logits.cpu(), self.sampling), 1, generator=self.generator))
