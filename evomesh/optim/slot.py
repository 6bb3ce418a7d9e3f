"""One parameter as the optimizer sees it: where its gradient is summed, and which part of its state lies here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evomesh.optim.clip import counts_here
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import ShardSpec, local_part, spec_of, stage_axes

HALF = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class ParameterSlot:
    """Attributes:
    name: global name.
    param: the parameter; under FSDP2 a DTensor.
    local: its storage on this rank, without gradient.
    cut: axis over which dim 0 of ``local`` is divided among optimizer states; of size 1 when it is not.
    sums: the other axes over which the gradient is still a partial sum.
    spec: how the state lies in the global tensor.
    counted: whether this rank counts the gradient in the global norm.
    target: what AdamW updates: own rows of ``local``, in place, or a float32 copy of them.
    accumulated: float32 sum of the micro-batches' gradients, of a float16 or bfloat16 parameter.
    micro_batches: gradients accumulated since ``reset``.
    """

    name: str
    param: nn.Parameter
    local: Tensor
    cut: Axis
    sums: tuple[Axis, ...]
    spec: ShardSpec
    counted: bool
    target: Tensor
    accumulated: Tensor | None = None
    micro_batches: int = 0

    @property
    def own(self) -> Tensor:
        """The rows of ``local`` that this rank updates, as a view."""
        if self.cut.size == 1:
            return self.local
        rows = self.local.shape[0] // self.cut.size
        return self.local.narrow(0, self.cut.rank * rows, rows)

    @property
    def gradient_dtype(self) -> torch.dtype:
        return self.local.dtype if self.accumulated is None else self.accumulated.dtype

    def accumulate(self) -> None:
        """Takes over the gradient that backward has just finished."""
        if self.accumulated is not None:
            assert self.param.grad is not None
            gradient = local_part(self.param.grad)
            if self.micro_batches:
                self.accumulated.add_(gradient)
            else:
                self.accumulated.copy_(gradient)
            self.param.grad = None
        self.micro_batches += 1

    def gradient(self) -> Tensor:
        """The local gradient; zeros when no micro-batch used the parameter, so that all ranks can take part."""
        if self.accumulated is not None:
            return self.accumulated if self.micro_batches else self.accumulated.zero_()
        return torch.zeros_like(self.local) if self.param.grad is None else local_part(self.param.grad)

    def reset(self) -> None:
        self.param.grad = None
        self.micro_batches = 0


def make_slot(name: str, param: nn.Parameter, grid: Grid) -> ParameterSlot:
    local, spec = local_part(param.detach()), spec_of(param)
    zero, replica, inner = axes = stage_axes(spec, grid)
    # Vectors are small, and with rows that do not divide a state would not be one equal range of the tensor.
    sharded = any(
        name == zero.name for name, _ in spec.shards
    )  # with fsdp parameter and gradient are cut as well
    divides = local.dim() > 1 and local.shape[0] % zero.size == 0
    cut = zero if divides and not sharded else Axis(zero.name)
    data = (replica,) if sharded else (zero, replica)
    partial = (*data, inner) if inner.name in spec.partial else data
    shards = (*spec.shards, (cut.name, 0)) if cut.size > 1 else spec.shards
    state_spec = replace(spec, shards=shards, partial=frozenset())
    slot = ParameterSlot(
        name=name,
        param=param,
        local=local,
        cut=cut,
        sums=tuple(axis for axis in partial if axis.size > 1 and axis is not cut),
        spec=state_spec,
        counted=counts_here(state_spec, axes),
        target=local,
    )
    slot.target = slot.own
    if local.dtype in HALF:
        slot.target = slot.own.to(torch.float32)
        slot.accumulated = torch.empty_like(local, dtype=torch.float32)
    return slot
