"""The global gradient norm: over all parameters and ranks, each element counted once.

Norm and clip factor are float64 scalars on the device: the host does not wait for them
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import ShardSpec

GradientCheck = Literal["ok", "inf", "nan"]


@dataclass(frozen=True)
class UpdateLimits:
    """The largest gradient norm and loss of a step whose update is made; a loss that is not finite is too large.

    Attributes:
        overflows: a norm that is not finite is usual if the loss is finite, and no reason to leave the step out.
    """

    norm: float = math.inf
    loss: float = math.inf
    overflows: bool = False

    def are_exceeded(self, norm: Tensor, loss: Tensor) -> Tensor:
        """Return whether the update is left out, a bool scalar: on the device, for which the host never waits."""
        is_large = (loss > self.loss) | ~loss.isfinite()
        if self.overflows:
            return is_large | ((norm > self.norm) & norm.isfinite())
        return is_large | (norm > self.norm) | ~norm.isfinite()


def global_norm(grads: Sequence[Tensor], grid: Grid, device: torch.device) -> Tensor:
    """Return the 2-norm of the gradients of all ranks, a float64 scalar, the same on every rank.

    Args:
        grads: the gradients that this rank counts (see ``counts_in_norm``).
    """
    no_sums = torch.zeros(0, dtype=torch.float64, device=device)
    return global_norm_and_sums(grads, no_sums, grid)[0]


def global_norm_and_sums(
    grads: Sequence[Tensor], sums: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Return the 2-norm of the gradients and ``sums``, over all ranks, by one message on each axis.

    Args:
        grads: the gradients that this rank counts (see ``counts_in_norm``).
        sums: [K] float64, this rank's summands of other totals.
    """
    # Both need one all-reduce per axis: [square, sum 1, ..., sum K].
    own_square = _sum_of_squares(grads, sums.device)
    own_square = own_square.unsqueeze(0)
    own_totals = [own_square, sums]
    message = torch.cat(own_totals)
    totals = all_reduce_no_grad(message, grid.dp, grid.tp, grid.pp)
    square = totals[0]
    norm = square.sqrt()
    other_totals = totals[1:]
    return norm, other_totals


def _sum_of_squares(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of all squared elements, a float64 scalar."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    norms = torch._foreach_norm(list(grads), 2, dtype=wide)
    # float64 across tensors: the square of a norm overflows float32 long before the
    # norm does.
    doubles = [norm.double() for norm in norms]
    return torch.stack(doubles).square().sum()


def counts_in_norm(spec: ShardSpec, axes: Sequence[Axis]) -> bool:
    """Return whether this rank counts its elements: it is the first rank on each axis that does not shard them.

    So of all ranks that hold the same elements exactly one counts them.

    Args:
        axes: the axes that span the stage as the parameter sees it (``optimizer_axes``).
    """
    sharding = {name for name, _ in spec.shards}
    return all(axis.name in sharding or axis.rank == 0 for axis in axes)


def check_norm(norm: float) -> GradientCheck:
    if math.isnan(norm):
        return "nan"
    return "inf" if math.isinf(norm) else "ok"


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor that reduces the gradient's norm to at most ``max_norm``; 0 disables clipping."""
    if max_norm == 0:
        return torch.ones_like(norm)
    return (torch.full_like(norm, max_norm) / (norm + 1e-6)).clamp(max=1.0)
