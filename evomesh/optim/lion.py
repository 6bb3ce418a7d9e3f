"""Lion (Chen et al., arXiv 2302.06675): the sign of a blend of momentum and gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evomesh.optim.rule import UpdateCounter, overwrite, true_gradient


class Lion(UpdateCounter):
    """Keeps one momentum for each master; half of AdamW's state.

    Args:
        decays: the masters to update, with their weight decay.
        beta1: weight of the momentum in the direction; that of the momentum's own decay is a step's ``beta2``.
    """

    def __init__(self, decays: Mapping[Tensor, float], beta1: float) -> None:
        super().__init__(next(iter(decays)).device)
        self.decays = decays
        self.beta1 = beta1
        self.momenta = {master: torch.zeros_like(master) for master in decays}

    def step(
        self,
        lr: float,
        beta2: float,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        for master, decay in self.decays.items():
            if master.grad is None:
                continue
            gradient = true_gradient(master.grad, grad_scale)
            momentum = self.momenta[master]
            direction = torch.lerp(gradient, momentum, self.beta1).sign_()
            decayed = master * (1 - lr * decay)
            overwrite(master, decayed.sub_(direction, alpha=lr), found_inf)
            overwrite(momentum, torch.lerp(gradient, momentum, beta2), found_inf)
        self.add(found_inf)

    def communicate(self) -> None:
        """Do nothing: every element is updated where it is."""

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        momentum = self.momenta.get(master)
        return {} if momentum is None else {"momentum": momentum}
