"""Simulation of one rank's streams: when each event of a timeline happens on a device.

All ranks of a layout do the same at the same time but for pipeline stages, so that a
collective begins when this rank has come to it. A communicator carries out one transfer
after the other, beside the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evomesh.plan.device import Device
from evomesh.plan.timeline import (
    COMPUTE,
    Event,
    Kernel,
    KernelKind,
    Mark,
    Transfer,
    Wait,
)

# Products with a dimension below it leave part of a GPU idle.
_FULL_SIZE = 128


@dataclass(frozen=True)
class AxisPlacement:
    """Ranks of an axis, and the number of nodes on which they are."""

    ranks: int
    nodes: int


@dataclass
class StreamTimes:
    """Times of the streams of a rank, in seconds.

    Attributes:
        busy: seconds by kind of kernel, and by operation and axis of transfers.
        exposed: seconds in which the compute stream waits for transfers.
    """

    ends: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    exposed: float = 0.0

    @property
    def end(self) -> float:
        return max(self.ends.values(), default=0.0)

    def occupy(self, stream: str, what: str, start: float, seconds: float) -> float:
        """Let a stream do something from ``start`` on, and return when that ends."""
        end = start + seconds
        self.ends[stream] = end
        self.busy[what] = self.busy.get(what, 0.0) + seconds
        return end


def kernel_seconds(kernel: Kernel, device: Device, dtype: str) -> float:
    """Return the time of a kernel as measured, or that of its operations or of its memory, whichever is longer."""
    measured = device.measured_seconds(kernel)
    if measured is not None:
        between_kernels = 0.0
        if device.host is not None:
            between_kernels = device.host.launch_seconds
        return (measured + between_kernels) * device.turns
    in_memory = device.memory_seconds(kernel.nbytes)
    shortest = max(in_memory, device.launch_seconds)
    if kernel.flops == 0:
        return shortest
    share = device.efficiencies.matrix
    if kernel.kind is KernelKind.ATTENTION:
        share = device.efficiencies.attention
    elif kernel.size < _FULL_SIZE:
        used = max(kernel.size, 1)
        share *= used / _FULL_SIZE
    products = device.product_seconds(kernel.flops, dtype, share)
    return max(shortest, products)


def simulate(
    events: Sequence[Event],
    device: Device,
    dtype: str,
    placements: Mapping[str, AxisPlacement],
    times: StreamTimes | None = None,
) -> StreamTimes:
    """Return the times of the streams after ``events``, all of which begin at 0.

    Args:
        dtype: of products.
        placements: by name of an axis.
        times: to fill, such as a ``StreamRecord``; a new one by default.
    """
    if times is None:
        times = StreamTimes()
    marks: dict[int, float] = {}
    ends = times.ends
    for event in events:
        now = ends.get(event.stream, 0.0)
        if isinstance(event, Kernel):
            seconds = kernel_seconds(event, device, dtype)
            times.occupy(event.stream, event.kind.value, now, seconds)
        elif isinstance(event, Mark):
            marks[event.mark] = now
        elif isinstance(event, Wait):
            # A mark of an earlier part has passed.
            until = marks.get(event.mark, 0.0)
            if event.stream == COMPUTE:
                times.exposed += max(until - now, 0.0)
            ends[event.stream] = max(now, until)
        else:
            marks[event.mark] = _transfer(event, now, times, marks, device, placements)
    return times


def _transfer(
    event: Transfer,
    now: float,
    times: StreamTimes,
    marks: Mapping[int, float],
    device: Device,
    placements: Mapping[str, AxisPlacement],
) -> float:
    """Carry out a transfer after those of its communicator, and return when it ends."""
    call = event.call
    placement = placements[call.axis]
    seconds = device.transfer_seconds(
        call.operation, call.nbytes, placement.ranks, placement.nodes
    )
    communicator = f"{call.operation} {call.axis}"
    start = max(now, times.ends.get(communicator, 0.0))
    for mark in event.after:
        start = max(start, marks.get(mark, 0.0))
    end = times.occupy(communicator, communicator, start, seconds)
    # Ranks on processors send by the cores on which they would compute.
    sending = seconds * (1 - device.hidden)
    if sending:
        times.ends[event.stream] = now + sending
    return end
