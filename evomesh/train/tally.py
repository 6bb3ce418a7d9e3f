"""Loss, accuracy and perplexity as sums over target tokens, one column per data type.

Sums add up over micro-batches, ranks and batches of any size, so every mean taken from
them weighs tokens equally.
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
    """Sums of negative log-likelihood, correct predictions and tokens, per data type.

    Args:
        types: names of the data types; ``type_ids`` index into them.
        device: where the sums are kept.
        sums: [3, types] float64 to start from (nll, correct, tokens); zeros when None.
    """

    def __init__(
        self, types: list[str], device: torch.device, sums: Tensor | None = None
    ) -> None:
        self.types = types
        self.sums = (
            torch.zeros(3, len(types), dtype=torch.float64, device=device)
            if sums is None
            else sums
        )

    def add(
        self,
        output: LossOutput,
        labels: Tensor,
        type_ids: Tensor,
    ) -> None:
        """Add one packed sequence; ``labels`` and ``type_ids`` are [T]."""
        is_target = labels != IGNORE
        correct = output.correct & is_target
        values = [
            output.nll.double() * is_target,
            correct.double(),
            is_target.double(),
        ]
        per_token = torch.stack(values)  # [3, T]
        # Sums over a [T, types] membership mask, because scattered adds have no fixed
        # order on CUDA. ``where`` instead of a product, because 0 * inf would leak one
        # type's overflow into the others.
        count = len(self.types)
        types = torch.arange(count, device=type_ids.device)
        is_of_type = type_ids.unsqueeze(1) == types  # [T, types]
        per_token = per_token.unsqueeze(2)
        by_type = torch.where(is_of_type, per_token, 0.0)  # [3, T, types]
        totals = by_type.sum(1)
        self.sums += totals

    def reduce(self, *axes: Axis) -> LossTally:
        """Sum over the ranks of ``axes``; every rank gets the result."""
        return LossTally(
            self.types, self.sums.device, all_reduce_no_grad(self.sums, *axes)
        )

    @property
    def targets(self) -> int:
        """Number of target tokens, of all types."""
        return int(self.sums[2].sum())

    def summary(self) -> dict[str, float]:
        """Return the means over all tokens and over each data type.

        Keys: ``loss``, ``acc``, ``perplexity``; and ``loss/TYPE``, ``acc/TYPE``, ``perplexity/TYPE``, ``tokens/TYPE``
        of each type that has tokens.
        """
        nll, correct, tokens = self.sums.tolist()
        result = _means(
            "",
            sum(nll),
            sum(correct),
            sum(tokens),
        )
        for index, name in enumerate(self.types):
            type_tokens = tokens[index]
            result |= _means(
                f"/{name}",
                nll[index],
                correct[index],
                type_tokens,
            )
            if type_tokens:
                result[f"tokens/{name}"] = int(type_tokens)
        return result


def _means(suffix: str, nll: float, correct: float, tokens: float) -> dict[str, float]:
    if not tokens:
        return {}
    loss = nll / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {
        f"loss{suffix}": loss,
        f"acc{suffix}": correct / tokens,
        f"perplexity{suffix}": perplexity,
    }
