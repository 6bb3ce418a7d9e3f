"""Collectives on local tensors: the only home of communication outside FSDP2 and the pipeline's p2p.

A differentiable collective states its type: how the tensor is distributed over the axis
before and after, in forward and in backward. Shapes in the docstrings are local, for an
axis of n ranks and a dim of global length L.

    R     replicated, used differently on each rank: the local gradients are partial sums
    I     replicated, used identically on each rank: every rank has the same, complete gradient
    P     partial: each rank holds one summand of the value
    S(d)  sharded: each rank holds an equal, contiguous range of dim d, in rank order

The backward of each is its dual, none writes to its input, and on an axis of size 1
each is the identity (invariant 3 in docs/architecture.md). Reductions are sums, never
means (invariant 4). The asynchronous collectives of the optimizer come last: buckets
without gradient, pending until ``wait()``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from evomesh.parallel.grid import Axis
from evomesh.parallel.recording import (
    gather_single,
    group_name,
    record_launch,
    record_transfer,
    recorded,
    reduce_scatter_single,
)
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place

SUM, MAX, MIN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenate the shards of all ranks: ``S(dim) -> R``, [L / n] -> [L].

    Backward: ``P -> S(dim)``, sum the gradients over the ranks and keep the own range (reduce-scatter), [L] -> [L / n].
    """
    return _apply(_AllGather, x, axis, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum over the ranks and keep the own range of the sum: ``P -> S(dim)``, [L] -> [L / n]; n must divide L.

    Backward: ``S(dim) -> R``, concatenate the gradients of all ranks (all-gather), [L / n] -> [L].
    """
    return _apply(_ReduceScatter, x, axis, dim)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the ranks: ``P -> I``, [L] -> [L]. Megatron's *g* (arXiv 1909.08053).

    Backward: ``I -> R``, pass the gradient through, without communication.
    """
    return _apply(_AllReduce, x, axis)


def copy_to_axis(x: Tensor, axis: Axis) -> Tensor:
    """Return ``x`` unchanged, for use that differs by rank: ``I -> R``, [L] -> [L], without communication.

    Backward: ``P -> I``, sum the gradients over the ranks (all-reduce). The dual of ``all_reduce``: Megatron's *f*.
    """
    return _apply(_CopyToAxis, x, axis)


def gather_from_axis(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenate the shards of all ranks, for identical use on each: ``S(dim) -> I``, [L / n] -> [L].

    Backward: ``I -> S(dim)``, keep the own range of the gradient, without communication, [L] -> [L / n].
    """
    return _apply(_GatherFromAxis, x, axis, dim)


def shard_to_axis(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Keep the own range of a replicated tensor: ``I -> S(dim)``, [L] -> [L / n], without communication.

    Backward: ``S(dim) -> I``, concatenate the gradients of all ranks (all-gather), [L / n] -> [L].
    """
    return _apply(_ShardToAxis, x, axis, dim)


def all_to_all(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    """Move the sharding to another dim: ``S(concat_dim) -> S(split_dim)``, [L, K / n] -> [L / n, K].

    Backward: ``S(split_dim) -> S(concat_dim)``, the reverse all-to-all, [L / n, K] -> [L, K / n].
    """
    if axis.size > 1 and split_dim == concat_dim:
        raise ValueError(f"all_to_all over one dim ({split_dim}) would only permute it")
    return _apply(_AllToAll, x, axis, split_dim, concat_dim)


def _apply(function: Any, x: Tensor, axis: Axis, *dims: int) -> Tensor:
    """Apply ``function``; on an axis of size 1 return ``x``, so that one process runs no custom function at all."""
    if axis.size == 1:
        return x
    for dim in dims:
        # Movedim(-1, 0) is not undone by movedim(0, -1) in the dual.
        if not 0 <= dim < x.dim():
            raise ValueError(f"dim {dim} of a tensor with {x.dim()} dims")
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
        # A copy of what c10d reduced in place: torch 2.11 compiles wrong gradients for
        # a function that returns the very tensor it wrote into (pytorch issue 180642).
        return all_reduce_no_grad(x, axis).clone()

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
        # A copy: a view would keep the whole input alive.
        return local_range(x, axis, dim).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather_no_grad(grad, ctx.axis, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: Axis, split_dim: int, concat_dim: int
    ) -> Tensor:
        ctx.axis, ctx.dims = axis, (split_dim, concat_dim)
        return all_to_all_no_grad(x, axis, split_dim, concat_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split_dim, concat_dim = ctx.dims
        return (
            all_to_all_no_grad(grad, ctx.axis, concat_dim, split_dim),
            None,
            None,
            None,
        )


def local_range(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Return this rank's range of ``dim`` as a view, [L] -> [L / n]."""
    _check_divisible(x, axis, dim)
    local = axis.shard(range(x.shape[dim]))
    return x.narrow(dim, local.start, len(local))


def _check_divisible(x: Tensor, axis: Axis, dim: int) -> None:
    if x.shape[dim] % axis.size:
        raise ValueError(
            f"dim {dim} of {tuple(x.shape)} is not divisible by {axis.name}={axis.size}"
        )


def _dim_first(x: Tensor, dim: int) -> Tensor:
    """Return the tensor as c10d wants it, which concatenates and splits dim 0 only: with ``dim`` there, contiguous."""
    return x.movedim(dim, 0).contiguous()


def _empty_rows(rows: int, source: Tensor) -> Tensor:
    """Return an empty tensor like ``source`` with another length of dim 0."""
    shape = (rows, *source.shape[1:])
    return source.new_empty(shape)


def all_gather_no_grad(
    x: Tensor,
    axis: Axis,
    dim: int = 0,
) -> Tensor:
    """Concatenate the tensors of all ranks along ``dim`` in rank order, [L / n] -> [L]; not differentiable."""
    if axis.size == 1:
        return x
    # The ranks' tensors are concatenated along the first dimension, whichever is asked for.
    source = _dim_first(x, dim)
    rows = len(source) * axis.size
    whole = _empty_rows(rows, source)
    with recorded(Place.ALL_GATHER, axis, source):
        gather_single(whole, source, group=axis.group)
    return whole.movedim(0, dim)


def reduce_scatter_no_grad(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum over the ranks and keep the own range of ``dim``, [L] -> [L / n]; not differentiable."""
    if axis.size == 1:
        return x
    _check_divisible(x, axis, dim)
    source = _dim_first(x, dim)
    own_rows = len(source) // axis.size
    own = _empty_rows(own_rows, source)
    group = axis.group
    with recorded(Place.REDUCE_SCATTER, axis, source):
        reduce_scatter_single(own, source, group=group)
    return own.movedim(0, dim)


def all_reduce_no_grad(
    x: Tensor, *axes: Axis, op: dist.ReduceOp.RedOpType = SUM
) -> Tensor:
    """Sum (or reduce with ``op``) over each of ``axes`` into a new tensor, [L] -> [L]; not differentiable."""
    for axis in axes:
        if axis.size > 1:
            x = x.clone(memory_format=torch.contiguous_format)
            with recorded(Place.ALL_REDUCE, axis, x):
                dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_to_all_no_grad(
    x: Tensor, axis: Axis, split_dim: int, concat_dim: int
) -> Tensor:
    """Send the j-th range of ``split_dim`` to rank j and concatenate what arrives along ``concat_dim``.

    [split, concat] [L, K / n] -> [L / n, K]; not differentiable.
    """
    if axis.size == 1:
        return x
    _check_divisible(x, axis, split_dim)
    chunks = x.chunk(axis.size, split_dim)
    source = torch.stack(chunks)
    received = torch.empty_like(source)
    with recorded(Place.ALL_TO_ALL, axis, source):
        dist.all_to_all_single(received, source, group=axis.group)
    return torch.cat(received.unbind(), concat_dim)


@dataclass(frozen=True)
class PendingCollective:
    """A collective that was launched; ``wait()`` completes it and returns its result. Call it once."""

    tensor: Tensor
    work: dist.Work | None
    source: Tensor  # kept alive until the transfer has read it
    group: str = field(default="", kw_only=True)  # for the record of what is waited for

    def wait(self) -> Tensor:
        if self.work is not None:
            with this_process().waiting(Place.PENDING, self.group):
                self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class _PendingRowSum(PendingCollective):
    """A sum whose summands are added in rank order: ``tensor`` [n, chunk] receives each rank's summand of this row.

    gloo sums along a ring that starts at a different rank for each part of the message,
    so the last bit of a sum would depend on the element's position in the bucket.
    Adding the rows in rank order costs the same traffic.
    """

    axis: Axis
    # Shape of the whole tensor if every rank needs all of it.
    shape: torch.Size | None = None

    def wait(self) -> Tensor:
        rows = super().wait()
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        if self.shape is None:
            return total
        padded = all_gather_no_grad(total, self.axis)
        return padded[: self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class _PendingNextSum(PendingCollective):
    """The sum of what another pending collective results in, which is kept until both are done."""

    first: PendingCollective


def _launch_row_exchange(
    bucket: Tensor, axis: Axis, shape: torch.Size | None = None
) -> PendingCollective:
    """Launch the exchange of ``bucket`` [n, chunk]: each rank receives all summands of the row that it sums."""
    summands = torch.empty_like(bucket)
    group = record_launch(Place.ALL_TO_ALL, axis, bucket)
    work = dist.all_to_all_single(
        summands.view(-1),
        bucket.view(-1),
        group=axis.group,
        async_op=True,
    )
    return _PendingRowSum(summands, work, bucket, axis, shape, group=group)


def launch_reduce_scatter(bucket: Tensor, axis: Axis) -> PendingCollective:
    """Launch the sum of ``bucket`` [n, chunk] over the axis; the result is row ``axis.rank`` of it, [chunk].

    The bucket must be contiguous and stay unchanged until ``wait()``. On the CPU
    summands are added in rank order.
    """
    if axis.size == 1:
        return PendingCollective(bucket[0], None, bucket)
    if bucket.is_cpu:
        return _launch_row_exchange(bucket, axis)
    chunk_shape = bucket.shape[1:]
    own = bucket.new_empty(chunk_shape)
    group = record_launch(Place.REDUCE_SCATTER, axis, bucket)
    work = reduce_scatter_single(
        own,
        bucket.view(-1),
        group=axis.group,
        async_op=True,
    )
    return PendingCollective(own, work, bucket, group=group)


def launch_all_gather(
    chunk: Tensor, axis: Axis, out: Tensor | None = None
) -> PendingCollective:
    """Launch the gather of every rank's ``chunk`` [chunk] into [n, chunk], the contiguous ``out`` if given."""
    if axis.size == 1:
        row = chunk.unsqueeze(0)
        return PendingCollective(row, None, chunk)
    if out is None:
        shape = (axis.size, *chunk.shape)
        out = chunk.new_empty(shape)
    group = record_launch(Place.ALL_GATHER, axis, chunk)
    work = gather_single(
        out.view(-1),
        chunk,
        group=axis.group,
        async_op=True,
    )
    return PendingCollective(out, work, chunk, group=group)


def _as_rows(bucket: Tensor, ranks: int) -> Tensor:
    """Return the elements as [ranks, chunk], each rank's row to sum; zeros fill the last row.

    10 elements on 4 ranks are 4 rows of 3, with 2 zeros at the end.
    """
    flat = bucket.reshape(-1)
    padding = -len(flat) % ranks
    padded = torch.nn.functional.pad(flat, (0, padding))
    return padded.view(ranks, -1)


def launch_all_reduce(bucket: Tensor, axis: Axis) -> PendingCollective:
    """Launch the sum of ``bucket`` over the axis, on CUDA in place; on the CPU summands are added in rank order.

    The bucket must be contiguous, and belongs to the collective from here on: a copy
    could be as large as the model.
    """
    has_peers = axis.size > 1
    if has_peers and bucket.is_cpu:
        rows = _as_rows(bucket, axis.size)
        return _launch_row_exchange(rows, axis, bucket.shape)
    work = None
    if has_peers:
        work = _launch_sum_(bucket, axis)
    group = group_name(axis)
    return PendingCollective(bucket, work, bucket, group=group)


def _launch_sum_(x: Tensor, axis: Axis) -> dist.Work | None:
    """Launch the all-reduce of ``x`` in place."""
    record_launch(Place.ALL_REDUCE, axis, x)
    work: dist.Work | None = dist.all_reduce(x, group=axis.group, async_op=True)
    return work


def launch_next_sum(
    pending: PendingCollective, axis: Axis, stream: torch.Stream | None
) -> PendingCollective:
    """Launch the sum of a pending result over a further axis, in place; not for the CPU, where the host would wait.

    Args:
        stream: of a CUDA device; it waits for the result, so that the current stream need not.
    """
    if stream is not None:
        cuda_stream = cast(torch.cuda.Stream, stream)
        with torch.cuda.stream(cuda_stream):
            return launch_next_sum(pending, axis, None)
    total = pending.wait()
    work = _launch_sum_(total, axis)
    group = group_name(axis)
    return _PendingNextSum(total, work, pending.source, pending, group=group)


def broadcast_from(x: Tensor, axis: Axis, source: int = 0) -> None:
    """Overwrite ``x`` with the tensor of axis rank ``source``; not differentiable, hence the write to its argument."""
    if axis.size > 1:
        assert axis.group is not None
        with recorded(Place.BROADCAST, axis, x):
            dist.broadcast(
                x, src=dist.get_global_rank(axis.group, source), group=axis.group
            )


def launch_send(x: Tensor, axis: Axis, to: int) -> dist.Work | None:
    """Launch a send of ``x`` to axis rank ``to``; ``x`` must stay unchanged until the work is done."""
    assert axis.group is not None
    record_transfer(Place.SEND, axis, axis.rank, to, x)
    return dist.isend(x, group=axis.group, group_dst=to)


def receive(x: Tensor, axis: Axis, source: int) -> Tensor:
    """Receive into ``x`` what axis rank ``source`` sends, and return it."""
    assert axis.group is not None
    channel = record_transfer(Place.RECEIVE, axis, source, axis.rank, x)
    with this_process().waiting(Place.RECEIVE, channel):
        dist.recv(x, group=axis.group, group_src=source)
    return x


def all_gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Return every rank's picklable ``value``, in axis order; for startup and log lines, not for the step."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    with recorded(Place.GATHER, axis, None):
        dist.all_gather_object(values, value, group=axis.group)
    return values
