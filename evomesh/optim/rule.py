"""The interface of the rules that update weights, to the optimizer that owns gradients, norm and communication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class UpdateRule(Protocol):
    """Updates some of a rank's masters from their gradients, and owns what it remembers of them."""

    def step(
        self,
        lr: float,
        beta2: float,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update every master that has a gradient.

        Args:
            grad_scale: float32 scalar by which float32 gradients are still to be divided.
            found_inf: float32 scalar; if it is 1, nothing changes, and the host need not know.
        """

    def communicate(self) -> None:
        """Send what a step sends, and update nothing: for a trace without numbers."""

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        """Return the live tensors that belong to a master, of its shape, by kind; empty if the rule is not its."""

    def restart(self, master: Tensor, weights: Tensor) -> None:
        """Begin anew from other weights of a master, of its shape."""

    def numbers(self) -> dict[str, Any]:
        """Return what a checkpoint stores besides tensors, ``steps`` at least; waits for the device."""

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        """Take the numbers of a checkpoint."""


class UpdateCounter:
    """Counts updates on the device, so that a skipped step is known to nobody else."""

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.float32, device=device)

    def restart(self, master: Tensor, weights: Tensor) -> None:
        """Do nothing: what is remembered is of gradients."""

    def numbers(self) -> dict[str, Any]:
        """Return the number of updates so far; waits for the device."""
        return {"steps": int(self._count)}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        self._count.fill_(int(numbers["steps"]))

    def add(self, found_inf: Tensor | None) -> None:
        """Count one update, unless ``found_inf`` is 1."""
        self._count += 1
        if found_inf is not None:
            self._count -= found_inf


def true_gradient(gradient: Tensor, grad_scale: Tensor | None) -> Tensor:
    """Return a gradient after the division that the optimizer leaves to the rule."""
    return gradient if grad_scale is None else gradient / grad_scale


def overwrite(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Copy ``value`` into ``target``, unless ``found_inf`` is 1: not one bit changes then."""
    if found_inf is not None:
        value = torch.where(found_inf > 0, target, value)
    target.copy_(value)
