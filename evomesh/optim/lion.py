"""Lion (Chen et al., arXiv 2302.06675): the sign of a blend of momentum and gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evomesh.optim.groups import UpdateSettings
from evomesh.optim.rule import UpdateCounter, overwrite, true_gradient


class Lion(UpdateCounter):
    """Keeps one momentum for each master; half of AdamW's state.

    Args:
        settings: the masters to update, with what holds for each.
        beta1: weight of the momentum in the direction; that of the momentum's own decay is a step's ``beta2``.
    """

    def __init__(self, settings: Mapping[Tensor, UpdateSettings], beta1: float) -> None:
        super().__init__(next(iter(settings)).device)
        self.settings = settings
        self.beta1 = beta1
        self.momenta = {master: torch.zeros_like(master) for master in settings}

    def step(
        self,
        lr: float,
        beta2: float,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        for master, own in self.settings.items():
            if master.grad is None:
                continue
            gradient = true_gradient(master.grad, grad_scale)
            momentum = self.momenta[master]
            direction = torch.lerp(gradient, momentum, self.beta1).sign_()
            rate = lr * own.lr_scale
            decayed = master * (1 - rate * own.weight_decay)
            overwrite(master, decayed.sub_(direction, alpha=rate), found_inf)
            overwrite(momentum, torch.lerp(gradient, momentum, beta2), found_inf)
        self.add(found_inf)

    def communicate(self) -> None:
        """Do nothing: every element is updated where it is."""

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        momentum = self.momenta.get(master)
        return {} if momentum is None else {"momentum": momentum}
