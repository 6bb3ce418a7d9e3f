"""One parameter as the optimizer sees it: the axes that sum its gradient, and this rank's shard of its state."""

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
    """One parameter with its gradient and its master weights on this rank.

    Attributes:
        name: global name.
        param: the parameter; under FSDP2 a DTensor.
        local: its storage on this rank, detached.
        shard_axis: axis that shards dim 0 of ``local`` for the optimizer state; of size 1 if the state is not sharded.
        sum_axes: the other axes over which the gradient is still a partial sum.
        spec: distribution of the optimizer state over the grid.
        counts_in_norm: whether this rank counts the gradient in the global norm.
        master: the tensor that AdamW updates: own rows of ``local``, in place, or a float32 copy of them.
        accumulated_grad: float32 sum of the micro-batches' gradients of a float16 or bfloat16 parameter,
            [n, numel / n] for the n ranks of ``shard_axis``; the optimizer's buckets provide the memory.
        uses: gradients of one micro-batch: 2 where a rank holds both ends of a pipeline
            and their tied embedding, else 1.
        backwards: gradients accumulated since ``reset``.
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
    uses: int = 1
    backwards: int = 0

    @property
    def own_rows(self) -> Tensor:
        """Return the rows of ``local`` that this rank updates, as a view."""
        if self.shard_axis.size == 1:
            return self.local
        rows = self.local.shape[0] // self.shard_axis.size
        return self.local.narrow(0, self.shard_axis.rank * rows, rows)

    @property
    def is_half(self) -> bool:
        """Return whether the parameter is float16 or bfloat16: its master and its gradient are float32."""
        return self.local.dtype in HALF

    @property
    def gradient_dtype(self) -> torch.dtype:
        return torch.float32 if self.is_half else self.local.dtype

    def accumulate(self) -> None:
        """Count the gradient that backward has just completed, and add it to ``accumulated_grad`` if there is one."""
        if self.accumulated_grad is not None:
            assert self.param.grad is not None
            gradient = local_shard(self.param.grad).reshape(self.accumulated_grad.shape)
            if self.backwards:
                self.accumulated_grad.add_(gradient)
            else:
                self.accumulated_grad.copy_(gradient)
            self.param.grad = None
        self.backwards += 1

    def gradient_rows(self) -> Tensor:
        """Return the local gradient as [n, numel / n], a view: row r is for rank r of ``shard_axis``.

        Zeros if no micro-batch used the parameter, so that all ranks can take part.
        """
        if self.accumulated_grad is not None:
            if not self.backwards:
                self.accumulated_grad.zero_()
            return self.accumulated_grad
        if self.param.grad is None:
            gradient = torch.zeros_like(self.local)
        else:
            gradient = local_shard(self.param.grad)
        return gradient.reshape(self.shard_axis.size, -1)

    def reset(self) -> None:
        self.param.grad = None
        self.backwards = 0


def make_slot(name: str, param: nn.Parameter, grid: Grid) -> ParameterSlot:
    """Decide how the optimizer state of a parameter is sharded, and allocate its master weights."""
    local = local_shard(param.detach())
    spec = spec_of(param)
    zero, replica, inner = optimizer_axes(spec, grid)
    fully_sharded = any(axis == zero.name for axis, _ in spec.shards)

    # 1. The state of a matrix is sharded over zero, unless fsdp has sharded parameter and gradient there already.
    #    Vectors are small, and a state of rows that do not divide would not be one equal range of the tensor.
    shard_axis = Axis(zero.name)  # of size 1
    rows_divide = local.dim() > 1 and local.shape[0] % zero.size == 0
    if rows_divide and not fully_sharded:
        shard_axis = zero
    shards = spec.shards
    if shard_axis.size > 1:
        shards = (*shards, (shard_axis.name, 0))
    state_spec = replace(spec, shards=shards, partial=frozenset())

    # 2. The gradient is summed over all ranks that saw other tokens; the shard axis sums by its reduce-scatter.
    partial_axes = [zero, replica]
    if fully_sharded:
        partial_axes.remove(zero)
    if inner.name in spec.partial:
        partial_axes.append(inner)

    # 3. A tied embedding is in two stages of a pipeline. Their sum comes after the sums inside each stage, so that
    #    both add the same two numbers.
    all_axes = [zero, replica, inner]
    if grid.ends.name in spec.partial:
        partial_axes.append(grid.ends)
        all_axes.append(grid.ends)
    sum_axes = [
        axis for axis in partial_axes if axis.size > 1 and axis is not shard_axis
    ]

    # 4. 16-bit parameters have float32 master weights of this rank's rows.
    slot = ParameterSlot(
        name=name,
        param=param,
        local=local,
        shard_axis=shard_axis,
        sum_axes=tuple(sum_axes),
        spec=state_spec,
        counts_in_norm=counts_in_norm(state_spec, all_axes),
        master=local,
    )
    slot.master = slot.own_rows.to(slot.gradient_dtype)
    return slot
