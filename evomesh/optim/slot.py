"""One parameter as the optimizer sees it: where its gradient is summed, and which part of its state lies here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evomesh.optim.clip import counts_in_norm
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import ShardSpec, local_shard, optimizer_axes, spec_of

HALF = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class ParameterSlot:
    """Attributes:
    name: global name.
    param: the parameter; under FSDP2 a DTensor.
    local: its storage on this rank, without gradient.
    shard_axis: axis over which dim 0 of ``local`` is divided among optimizer states; of size 1 when it is not.
    sum_axes: the other axes over which the gradient is still a partial sum.
    spec: how the state lies in the global tensor.
    counts_in_norm: whether this rank counts the gradient in the global norm.
    master: what AdamW updates: own rows of ``local``, in place, or a float32 copy of them.
    accumulated_grad: float32 sum of the micro-batches' gradients, of a float16 or bfloat16 parameter.
    micro_batches: gradients accumulated since ``reset``.
    """

    name: str
    param: nn.Parameter
    local: Tensor
    shard_axis: Axis
    sum_axes: tuple[Axis, ...]
    spec: ShardSpec
    counts_in_norm: bool
    master: Tensor
    accumulated_grad: Tensor | None = None
    micro_batches: int = 0

    @property
    def own_rows(self) -> Tensor:
        """The rows of ``local`` that this rank updates, as a view."""
        if self.shard_axis.size == 1:
            return self.local
        rows = self.local.shape[0] // self.shard_axis.size
        return self.local.narrow(0, self.shard_axis.rank * rows, rows)

    @property
    def gradient_dtype(self) -> torch.dtype:
        return self.local.dtype if self.accumulated_grad is None else self.accumulated_grad.dtype

    def accumulate(self) -> None:
        """Takes over the gradient that backward has just finished."""
        if self.accumulated_grad is not None:
            assert self.param.grad is not None
            gradient = local_shard(self.param.grad)
            if self.micro_batches:
                self.accumulated_grad.add_(gradient)
            else:
                self.accumulated_grad.copy_(gradient)
            self.param.grad = None
        self.micro_batches += 1

    def gradient(self) -> Tensor:
        """The local gradient; zeros when no micro-batch used the parameter, so that all ranks can take part."""
        if self.accumulated_grad is not None:
            return self.accumulated_grad if self.micro_batches else self.accumulated_grad.zero_()
        return torch.zeros_like(self.local) if self.param.grad is None else local_shard(self.param.grad)

    def reset(self) -> None:
        self.param.grad = None
        self.micro_batches = 0


def make_slot(name: str, param: nn.Parameter, grid: Grid) -> ParameterSlot:
    local, spec = local_shard(param.detach()), spec_of(param)
    zero, replica, inner = axes = optimizer_axes(spec, grid)
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
        shard_axis=cut,
        sum_axes=tuple(axis for axis in partial if axis.size > 1 and axis is not cut),
        spec=state_spec,
        counts_in_norm=counts_in_norm(state_spec, axes),
        master=local,
    )
    slot.master = slot.own_rows
    if local.dtype in HALF:
        slot.master = slot.own_rows.to(torch.float32)
        slot.accumulated_grad = torch.empty_like(local, dtype=torch.float32)
    return slot
