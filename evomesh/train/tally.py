"""Loss, accuracy and perplexity as sums over target tokens, one column per data type.

Sums add up over micro-batches, ranks and batches of any size, so every mean taken from them weighs tokens equally.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evomesh.config.schema import IGNORE
from evomesh.layers.loss import LossOutput
from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.parallel.grid import Axis


class LossTally:
    """Args:
    types: names of the data types; ``type_ids`` index into them.
    device: where the sums are kept.
    sums: [3, types] float64 to start from: nll, correct, tokens; zeros otherwise.
    """

    def __init__(self, types: list[str], device: torch.device, sums: Tensor | None = None) -> None:
        self.types = types
        self.sums = torch.zeros(3, len(types), dtype=torch.float64, device=device) if sums is None else sums

    def add(self, output: LossOutput, labels: Tensor, type_ids: Tensor) -> None:
        """Adds one packed sequence; ``labels`` and ``type_ids`` are [T]."""
        target = labels != IGNORE
        rows = torch.stack(
            [output.nll.double() * target, (output.correct & target).double(), target.double()]
        )
        # A product with the membership matrix, since scattered adds have no fixed order on CUDA.
        member = type_ids[:, None] == torch.arange(len(self.types), device=type_ids.device)
        # 0 * inf would leak a type's overflow into the others
        self.sums += torch.where(member, rows[:, :, None], 0.0).sum(1)

    def reduce(self, *axes: Axis) -> LossTally:
        """Sums over the ranks of ``axes``; every rank gets the result."""
        return LossTally(self.types, self.sums.device, all_reduce_no_grad(self.sums, *axes))

    def summary(self) -> dict[str, float]:
        """``loss``, ``acc``, ``perplexity`` over all tokens and ``loss/TYPE``, ``acc/TYPE``, ``tokens/TYPE``,
        ``perplexity/TYPE`` for each type that has tokens; a type without any is absent."""
        nll, correct, tokens = self.sums.tolist()
        result = _means("", sum(nll), sum(correct), sum(tokens))
        for name, *sums in zip(self.types, nll, correct, tokens, strict=True):
            result |= _means(f"/{name}", *sums)
            if sums[2]:
                result[f"tokens/{name}"] = int(sums[2])
        return result


def _means(suffix: str, nll: float, correct: float, tokens: float) -> dict[str, float]:
    if not tokens:
        return {}
    loss = nll / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {f"loss{suffix}": loss, f"acc{suffix}": correct / tokens, f"perplexity{suffix}": perplexity}
