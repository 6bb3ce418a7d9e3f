"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) on given tensors: moments, and torch's fused update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from evomesh.optim.groups import UpdateSettings


@dataclass(frozen=True, eq=False)
class AdamMoments:
    """AdamW state of one tensor; ``step`` is a float32 scalar, because the fused kernel increments it on the device."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


@dataclass(frozen=True, eq=False)
class AdamW:
    """AdamW by the function that ``torch.optim.AdamW`` calls; the class imports torch's compiler, which takes 0.7 s.

    Attributes:
        settings: the tensors to update, with what holds for each.
    """

    settings: Mapping[Tensor, UpdateSettings]
    beta1: float
    eps: float
    moments: dict[Tensor, AdamMoments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # torch's optimizers allocate in the first step. Here a checkpoint is loaded into
        # the moments before it, and a lack of memory shows at once.
        for target in self.settings:
            step = torch.zeros((), dtype=torch.float32, device=target.device)
            exp_avg = torch.zeros_like(target)
            exp_avg_sq = torch.zeros_like(target)
            self.moments[target] = AdamMoments(exp_avg, exp_avg_sq, step)

    def step(
        self,
        lr: float,
        beta2: float,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update every tensor that has a gradient.

        Args:
            grad_scale: float32 scalar by which the kernel divides float32 gradients.
            found_inf: float32 scalar; if it is 1, the kernel changes no tensor, moment or step count.
        """
        for settings in dict.fromkeys(self.settings.values()):
            group: list[Tensor] = []
            gradients: list[Tensor] = []
            for target, own in self.settings.items():
                if own == settings and target.grad is not None:
                    group.append(target)
                    gradients.append(target.grad)
            states = [self.moments[target] for target in group]
            adamw(
                group,
                gradients,
                exp_avgs=[state.exp_avg for state in states],
                exp_avg_sqs=[state.exp_avg_sq for state in states],
                max_exp_avg_sqs=[],  # amsgrad's
                state_steps=[state.step for state in states],
                fused=True,
                grad_scale=grad_scale,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self.beta1,
                beta2=beta2,
                lr=lr * settings.lr_scale,
                weight_decay=settings.weight_decay,
                eps=self.eps,
                maximize=False,
            )

    def communicate(self) -> None:
        """Do nothing: every element is updated where it is."""

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        """Return the moments of a master by kind."""
        moments = self.moments.get(master)
        if moments is None:
            return {}
        return {"exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq}

    def restart(self, master: Tensor, weights: Tensor) -> None:
        """Do nothing: what is remembered is of gradients."""

    def numbers(self) -> dict[str, Any]:
        """Return the number of updates so far; waits for the device."""
        steps = torch.stack([moments.step for moments in self.moments.values()])
        return {"steps": int(steps.max())}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        for moments in self.moments.values():
            moments.step.fill_(int(numbers["steps"]))
