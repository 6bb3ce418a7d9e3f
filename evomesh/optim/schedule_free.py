"""Schedule-Free AdamW (Defazio et al., arXiv 2405.15682): training at y, between a fast sequence z and its average x.

    y = (1 - beta1) z + beta1 x             the gradient is taken here
    z' = z - lr (g / (sqrt(v) + eps) + decay y)
    x' = (1 - c) x + c z'                   c = lr^2 / sum of all lr^2 so far

The masters hold y. What is evaluated and stored as the weights is x, which follows from y and z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomesh.optim.groups import UpdateSettings
from evomesh.optim.rule import UpdateCounter, overwrite, true_gradient


@dataclass(frozen=True, eq=False)
class FastSequence:
    """The state of one master: z, and the mean of squared gradients."""

    z: Tensor
    exp_avg_sq: Tensor


class ScheduleFree(UpdateCounter):
    """Averages the weights instead of lowering the learning rate; two tensors for each master, as AdamW.

    Args:
        settings: the masters to update, with what holds for each. A factor of the learning rate leaves c as it is.
        beta1: weight of the average in y; above 0.
    """

    def __init__(
        self, settings: Mapping[Tensor, UpdateSettings], beta1: float, eps: float
    ) -> None:
        device = next(iter(settings)).device
        super().__init__(device)
        self.settings = settings
        self.beta1 = beta1
        self.eps = eps
        self.sequences = {
            master: FastSequence(master.clone(), torch.zeros_like(master))
            for master in settings
        }
        # Of the squares of all learning rates, on the device as the count is.
        self._weight_sum = torch.zeros((), dtype=torch.float64, device=device)

    def step(
        self,
        lr: float,
        beta2: float,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        self.add(found_inf)
        weight_sum = self._weight_sum + lr**2
        overwrite(self._weight_sum, weight_sum, found_inf)
        # 0 for as long as the learning rate is.
        tiny = torch.finfo(torch.float64).tiny
        average_weight = lr**2 / weight_sum.clamp(min=tiny)
        correction = 1 - beta2 ** self._count.double()
        for master, own in self.settings.items():
            if master.grad is None:
                continue
            gradient = true_gradient(master.grad, grad_scale)
            sequence = self.sequences[master]
            squares = torch.lerp(gradient.square(), sequence.exp_avg_sq, beta2)
            corrected = squares / correction
            scale = corrected.sqrt_().add_(self.eps)
            direction = gradient / scale
            direction.add_(master, alpha=own.weight_decay)
            rate = lr * own.lr_scale
            moved = self._moved(master, sequence.z, direction, average_weight, rate)
            overwrite(master, moved, found_inf)
            fast = sequence.z - rate * direction
            overwrite(sequence.z, fast, found_inf)
            overwrite(sequence.exp_avg_sq, squares, found_inf)

    def _moved(
        self, y: Tensor, z: Tensor, direction: Tensor, c: Tensor, lr: float
    ) -> Tensor:
        """Return the new y, without x: it would lose a digit each time that it is made from y and z."""
        toward_fast = y + c * (z - y)
        size = lr * (self.beta1 * (1 - c) - 1)
        return toward_fast + size * direction

    def communicate(self) -> None:
        """Do nothing: every element is updated where it is."""

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        sequence = self.sequences.get(master)
        if sequence is None:
            return {}
        return {"z": sequence.z, "exp_avg_sq": sequence.exp_avg_sq}

    def restart(self, master: Tensor, weights: Tensor) -> None:
        sequence = self.sequences.get(master)
        if sequence is not None:
            sequence.z.copy_(weights)

    def average_of(self, master: Tensor) -> Tensor:
        """Return x of a master."""
        z = self.sequences[master].z
        return z + (master - z) / self.beta1

    def numbers(self) -> dict[str, Any]:
        return {**super().numbers(), "weight_sum": float(self._weight_sum)}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        super().load_numbers(numbers)
        self._weight_sum.fill_(float(numbers["weight_sum"]))
