"""The global gradient norm: over all parameters and ranks, each element counted once.

Norm and clip factor stay scalars on the device, in float64: no host waits for them here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import ShardSpec

GradientCheck = Literal["ok", "inf", "nan"]


def global_norm(grads: Sequence[Tensor], grid: Grid, device: torch.device) -> Tensor:
    """The 2-norm over the gradients of all ranks: ``grads`` are those that this rank counts (see ``counts_in_norm``).

    The result is the same number on every rank.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    if grads:
        # float64 across tensors: a square of a norm overflows float32 long before the norm does
        norms = torch._foreach_norm(list(grads), 2, dtype=torch.promote_types(grads[0].dtype, torch.float32))
        total = torch.stack([norm.double() for norm in norms]).square().sum()
    return all_reduce_no_grad(total, grid.dp, grid.tp, grid.pp).sqrt()


def counts_in_norm(spec: ShardSpec, axes: Sequence[Axis]) -> bool:
    """Of all ranks that hold the same elements exactly one counts them: the first on each axis that does not cut them.

    Args:
        axes: the view of the grid that the parameter lives on.
    """
    cut = {name for name, _ in spec.shards}
    return all(axis.name in cut or axis.rank == 0 for axis in axes)


def check_norm(norm: float) -> GradientCheck:
    return "nan" if math.isnan(norm) else "inf" if math.isinf(norm) else "ok"


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What the gradient is multiplied with so that its norm is at most ``max_norm``; 0 means no clipping."""
    if max_norm == 0:
        return torch.ones_like(norm)
    return (torch.full_like(norm, max_norm) / (norm + 1e-6)).clamp(max=1.0)
