"""Recording of this rank's communication for the watchdog: collectives, those of FSDP2, and the pipeline's transfers.

A collective has a number in its group, the same on all ranks; a transfer one in its
channel, the sends of one rank to another, the same at both ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evomesh.parallel.grid import Axis
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place

# torch 2.13 renamed these two: the old names warn there, the new ones do not exist in
# earlier versions.
gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


def group_name(axis: Axis) -> str:
    """Return a name that all members of the axis have for it, and no other group has."""
    return f"{axis.name}:{axis.group.group_name}" if axis.group is not None else ""


def channel_name(axis: Axis, source: int, target: int) -> str:
    """Return the name of what axis rank ``source`` sends to ``target``: ``pp 0 to 1:...``."""
    assert axis.group is not None
    return f"{axis.name} {source} to {target}:{axis.group.group_name}"


def is_recording() -> bool:
    """Return whether there is a record to write to; a compiled graph calls collectives without these functions."""
    return not torch.compiler.is_compiling() and this_process().is_open


def recorded(
    operation: Place, axis: Axis, data: Tensor | None
) -> AbstractContextManager[object]:
    """Return a context in which this rank is recorded to be in a collective; ``data`` has the same size on all."""
    if not is_recording():
        return nullcontext()
    nbytes = data.nbytes if data is not None else 0
    return this_process().collective(operation, group_name(axis), nbytes)


def record_launch(operation: Place, axis: Axis, data: Tensor) -> str:
    """Record that a collective was launched and return the name of its group."""
    if not is_recording():
        return ""
    group = group_name(axis)
    this_process().launched(operation, group, data.nbytes)
    return group


def record_transfer(
    operation: Place, axis: Axis, source: int, target: int, data: Tensor
) -> str:
    """Record that a send or a receive was launched and return the name of its channel."""
    if not is_recording():
        return ""
    channel = channel_name(axis, source, target)
    this_process().launched(operation, channel, data.nbytes)
    return channel


class RecordedWork(dist.Work):
    """Pending collective of FSDP2 whose wait is recorded."""

    def __init__(self, work: dist.Work, group: str) -> None:
        super().__init__()
        self._work = work
        self._group = group

    def wait(self, timeout: timedelta | None = None) -> bool:
        with this_process().waiting(Place.PENDING, self._group):
            return self._work.wait() if timeout is None else self._work.wait(timeout)


class _RecordedComm:
    """The part of a custom collective of FSDP2 that both kinds share: all but the call itself."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class RecordedAllGather(_RecordedComm):
    """FSDP2's own gather of weights, recorded."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        if not async_op:
            with recorded(Place.ALL_GATHER, self._axis, input_tensor):
                gather_single(output_tensor, input_tensor, group=group)
            return None
        name = record_launch(Place.ALL_GATHER, self._axis, input_tensor)
        work = gather_single(output_tensor, input_tensor, group=group, async_op=True)
        return RecordedWork(work, name) if name else work


class RecordedReduceScatter(_RecordedComm):
    """FSDP2's own sum of gradients, recorded."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        with recorded(Place.REDUCE_SCATTER, self._axis, input_tensor):
            work: dist.Work | None = reduce_scatter_single(
                output_tensor, input_tensor, group=group, op=op, async_op=async_op
            )
        return work


class TransferRecord:
    """Recording of the transfers of torch's pipeline schedules, which call neither us nor a hook while they wait.

    Between two computations of its stages a schedule only launches transfers and waits
    for them. So the rank is recorded as waiting from the end of each to the begin of the
    next: for the oldest receive whose data no computation has used, else for its newest send.

    Args:
        axis: of the pipeline.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        # What is received, as (stage, direction, micro-batch) -> channel, its number there.
        self._pending: dict[tuple[int, str, int], tuple[str, int]] = {}
        self._sent = ("", 0)
        self._frame: bool | None = None  # as `Activity.enter` returned it

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record in the ``with`` block, which is a run of a schedule."""
        self._pending.clear()
        self._sent = ("", 0)
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def send(self, target: int, operations: Sequence[dist.P2POp]) -> None:
        """Record that sends to axis rank ``target`` are launched next."""
        for operation in operations:
            self._sent = self._launch(
                Place.SEND, self._axis.rank, target, operation.tensor
            )
        self._refresh()

    def receive(
        self,
        source: int,
        operations: Sequence[dist.P2POp],
        key: tuple[int, str, int],
    ) -> None:
        """Record that receives from axis rank ``source``, of what ``key`` means, are launched next."""
        for operation in operations:
            self._pending[key] = self._launch(
                Place.RECEIVE, source, self._axis.rank, operation.tensor
            )
        self._refresh()

    @contextmanager
    def computing(self, key: tuple[int, str, int]) -> Iterator[None]:
        """Record in the ``with`` block that a stage computes with what was received for ``key``."""
        self._pending.pop(key, None)
        self._leave()
        try:
            yield
        finally:
            self._enter()

    def _launch(
        self, place: Place, source: int, target: int, data: Tensor
    ) -> tuple[str, int]:
        channel = channel_name(self._axis, source, target)
        number = this_process().launched(place, channel, data.nbytes)
        return channel, number

    def _enter(self) -> None:
        if self._frame is not None or not this_process().is_open:
            return
        place = Place.SEND
        channel, number = self._sent
        if self._pending:
            place = Place.RECEIVE
            channel, number = next(iter(self._pending.values()))
        if channel:
            self._frame = this_process().enter(place, channel, number, "")

    def _leave(self) -> None:
        if self._frame is not None:
            this_process().leave(self._frame)
            self._frame = None

    def _refresh(self) -> None:
        """Write the wait again, after a transfer was launched."""
        self._leave()
        self._enter()
