"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) on given tensors: their moments, and torch's fused update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(frozen=True, eq=False)
class AdamMoments:
    """Of one tensor; ``step`` is a float32 scalar beside it, because the fused kernel counts on the device."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


@dataclass(frozen=True, eq=False)
class AdamW:
    """The function behind ``torch.optim.AdamW``; the class brings in torch's compiler, most of a second of every start.

    Attributes:
        decays: the tensors to update, with their weight decay.
    """

    decays: Mapping[Tensor, float]
    beta1: float
    eps: float
    moments: dict[Tensor, AdamMoments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for target in self.decays:
            step = torch.zeros((), dtype=torch.float32, device=target.device)
            self.moments[target] = AdamMoments(torch.zeros_like(target), torch.zeros_like(target), step)

    def step(
        self, lr: float, beta2: float, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """One update of every tensor that has a gradient.

        Args:
            grad_scale: float32 scalar that float32 gradients are divided by on their way.
            found_inf: float32 scalar; where it is 1 the kernel leaves tensors, moments and step counts as they are.
        """
        for decay in dict.fromkeys(self.decays.values()):
            group = [
                target for target, own in self.decays.items() if own == decay and target.grad is not None
            ]
            moments = [self.moments[target] for target in group]
            adamw(
                group,
                [target.grad for target in group if target.grad is not None],
                [of.exp_avg for of in moments],
                [of.exp_avg_sq for of in moments],
                [],
                [of.step for of in moments],
                fused=True,
                grad_scale=grad_scale,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self.beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=decay,
                eps=self.eps,
                maximize=False,
            )

    @property
    def steps(self) -> int:
        """Updates made so far (waits for the device)."""
        return int(torch.stack([moments.step for moments in self.moments.values()]).max())

    def set_steps(self, steps: int) -> None:
        for moments in self.moments.values():
            moments.step.fill_(steps)
