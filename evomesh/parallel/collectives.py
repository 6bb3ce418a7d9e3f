"""Collectives on local tensors: the only home of communication outside FSDP2 and the pipeline's p2p.

Differentiable ones state their type: how the tensor lies on the axis before and after, forward and backward.

    R     every rank holds the whole value, and uses it on its own: gradients are partial sums
    I     every rank holds the whole value, and uses it the same way: gradients are the same on every rank
    P     every rank holds one summand of the value
    S(d)  every rank holds one equal, contiguous range of dim d, in rank order

Each one's backward is its dual, none writes to its input, and an axis of size 1 makes each the identity.
Sums, never means: the only division is in the loss. The second half of the file is for optimizers: buckets without
gradient, in flight until ``wait()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from evomesh.parallel.grid import Axis

# torch 2.13 renamed these two; the old names warn, the new ones are absent before.
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SUM, MAX, MIN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """``S(dim) -> R; backward P -> S(dim)`` (reduce-scatter)."""
    return _apply(_AllGather, x, axis, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """``P -> S(dim); backward S(dim) -> R`` (all-gather). ``dim`` must divide by the axis."""
    return _apply(_ReduceScatter, x, axis, dim)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """``P -> I; backward I -> R``, no communication. Megatron's *g* (arXiv 1909.08053)."""
    return _apply(_AllReduce, x, axis)


def copy_to_axis(x: Tensor, axis: Axis) -> Tensor:
    """``I -> R``, no communication; ``backward P -> I`` (all-reduce). Megatron's *f*: the dual of ``all_reduce``."""
    return _apply(_CopyToAxis, x, axis)


def gather_from_axis(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """``S(dim) -> I; backward I -> S(dim)`` (own range, no communication)."""
    return _apply(_GatherFromAxis, x, axis, dim)


def shard_to_axis(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """``I -> S(dim)`` (own range, no communication); ``backward S(dim) -> I`` (all-gather)."""
    return _apply(_ShardToAxis, x, axis, dim)


def all_to_all(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    """``S(concat_dim) -> S(split_dim); backward S(split_dim) -> S(concat_dim)`` (all-to-all back)."""
    if axis.size > 1 and split_dim == concat_dim:
        raise ValueError(f"all_to_all over one dim ({split_dim}) would only permute it")
    return _apply(_AllToAll, x, axis, split_dim, concat_dim)


def _apply(function: Any, x: Tensor, axis: Axis, *dims: int) -> Tensor:
    """The identity on an axis of one rank, so that one process runs no custom function at all."""
    if axis.size == 1:
        return x
    for dim in dims:
        if not 0 <= dim < x.dim():
            raise ValueError(
                f"dim {dim} of a tensor with {x.dim()} dims"
            )  # negative dims break the duals' moves
    y: Tensor = function.apply(x, axis, *dims)
    return y


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather_no_grad(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter_no_grad(grad, ctx.axis, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter_no_grad(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather_no_grad(grad, ctx.axis, ctx.dim), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce_no_grad(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _CopyToAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce_no_grad(grad, ctx.axis), None


class _GatherFromAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather_no_grad(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return local_range(grad, ctx.axis, ctx.dim).contiguous(), None, None


class _ShardToAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return local_range(x, axis, dim).clone(
            memory_format=torch.contiguous_format
        )  # a view would keep the whole input alive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather_no_grad(grad, ctx.axis, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
        ctx.axis, ctx.dims = axis, (split_dim, concat_dim)
        return all_to_all_no_grad(x, axis, split_dim, concat_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split_dim, concat_dim = ctx.dims
        return all_to_all_no_grad(grad, ctx.axis, concat_dim, split_dim), None, None, None


def local_range(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's range of ``dim``, as a view."""
    if x.shape[dim] % axis.size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} does not divide by {axis.name}={axis.size}")
    local = axis.shard(range(x.shape[dim]))
    return x.narrow(dim, local.start, len(local))


def all_gather_no_grad(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """All ranks' tensors joined along ``dim`` in rank order, without gradient."""
    if axis.size == 1:
        return x
    source = x.movedim(dim, 0).contiguous()
    whole = source.new_empty((axis.size * source.shape[0], *source.shape[1:]))
    _gather_single(whole, source, group=axis.group)
    return whole.movedim(0, dim)


def reduce_scatter_no_grad(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's range of ``dim`` of the sum over the axis, without gradient."""
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} does not divide by {axis.name}={axis.size}")
    source = x.movedim(dim, 0).contiguous()
    own = source.new_empty((source.shape[0] // axis.size, *source.shape[1:]))
    _reduce_scatter_single(own, source, group=axis.group)
    return own.movedim(0, dim)


def all_reduce_no_grad(x: Tensor, *axes: Axis, op: dist.ReduceOp.RedOpType = SUM) -> Tensor:
    """The sum (or ``op``) over every one of ``axes``, in a new tensor, without gradient."""
    for axis in axes:
        if axis.size > 1:
            x = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_to_all_no_grad(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    """Sends the j-th range of ``split_dim`` to rank j and joins what arrives along ``concat_dim``."""
    if axis.size == 1:
        return x
    if x.shape[split_dim] % axis.size:
        raise ValueError(f"dim {split_dim} of {tuple(x.shape)} does not divide by {axis.name}={axis.size}")
    source = torch.stack(x.chunk(axis.size, split_dim))
    arrived = torch.empty_like(source)
    dist.all_to_all_single(arrived, source, group=axis.group)
    return torch.cat(arrived.unbind(), concat_dim)


@dataclass(frozen=True)
class PendingCollective:
    """A collective under way: ``wait()`` returns its result, once."""

    tensor: Tensor
    work: dist.Work | None
    source: Tensor  # kept alive until the transfer has read it

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class _PendingRowSum(PendingCollective):
    """``tensor`` [size, chunk] is receiving every rank's summand of this rank's row.

    gloo's own sums go round a ring that starts elsewhere for each part of the message, so that the last bit of a sum
    would depend on where in a bucket it lies. Adding the rows in rank order costs the same traffic.
    """

    axis: Axis
    shape: torch.Size | None = None  # of the whole tensor, when all ranks want all of it

    def wait(self) -> Tensor:
        rows = super().wait()
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return (
            total
            if self.shape is None
            else all_gather_no_grad(total, self.axis)[: self.shape.numel()].view(self.shape)
        )


def _launch_row_exchange(bucket: Tensor, axis: Axis, shape: torch.Size | None = None) -> PendingCollective:
    rows = torch.empty_like(bucket)
    work = dist.all_to_all_single(rows.view(-1), bucket.view(-1), group=axis.group, async_op=True)
    return _PendingRowSum(rows, work, bucket, axis, shape)


def launch_reduce_scatter(bucket: Tensor, axis: Axis) -> PendingCollective:
    """Starts summing ``bucket`` [size, chunk] over the axis; row ``axis.rank`` [chunk] is the result.

    The bucket must be contiguous and stay unchanged until ``wait()``. On the CPU the summands are added in rank order.
    """
    if axis.size == 1:
        return PendingCollective(bucket[0], None, bucket)
    if bucket.is_cpu:
        return _launch_row_exchange(bucket, axis)
    own = bucket.new_empty(bucket.shape[1:])
    return PendingCollective(
        own, _reduce_scatter_single(own, bucket.view(-1), group=axis.group, async_op=True), bucket
    )


def launch_all_gather(chunk: Tensor, axis: Axis, out: Tensor | None = None) -> PendingCollective:
    """Starts gathering every rank's ``chunk`` [chunk] into [size, chunk], the contiguous ``out`` if given."""
    if axis.size == 1:
        return PendingCollective(chunk.unsqueeze(0), None, chunk)
    bucket = chunk.new_empty((axis.size, *chunk.shape)) if out is None else out
    return PendingCollective(
        bucket, _gather_single(bucket.view(-1), chunk, group=axis.group, async_op=True), chunk
    )


def launch_all_reduce(bucket: Tensor, axis: Axis) -> PendingCollective:
    """Starts summing ``bucket`` over the axis, in a copy of it; on the CPU the summands are added in rank order."""
    if axis.size == 1:
        return PendingCollective(bucket, None, bucket)
    if bucket.is_cpu:
        padding = -bucket.numel() % axis.size
        rows = torch.nn.functional.pad(bucket.reshape(-1), (0, padding)).view(axis.size, -1)
        return _launch_row_exchange(rows, axis, bucket.shape)
    total = bucket.clone()
    return PendingCollective(total, dist.all_reduce(total, group=axis.group, async_op=True), bucket)


def broadcast_from(x: Tensor, axis: Axis, source: int = 0) -> None:
    """Overwrites ``x`` with the tensor of axis rank ``source``: the one collective that writes to its argument."""
    if axis.size > 1:
        assert axis.group is not None
        dist.broadcast(x, src=dist.get_global_rank(axis.group, source), group=axis.group)


def launch_send(x: Tensor, axis: Axis, to: int) -> dist.Work | None:
    """Starts sending ``x`` to axis rank ``to``; keep it unchanged until the work is done."""
    assert axis.group is not None
    return dist.isend(x, group=axis.group, group_dst=to)


def receive(x: Tensor, axis: Axis, source: int) -> Tensor:
    """Fills ``x`` with what axis rank ``source`` sends."""
    assert axis.group is not None
    dist.recv(x, group=axis.group, group_src=source)
    return x


def all_gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Every rank's picklable ``value``, in axis order; for start-up and log lines, not for the step."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def same_everywhere(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)
