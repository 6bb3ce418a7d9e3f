"""Times of parts, and of chains of them: a stage of any depth from the parts of a small model.

A part is timed once for a device: kernels that follow each other on a stream become one
span. A mark is known by its part and its number there, so that a layer that is repeated
waits for the layer before it, as the traced one did:

    traced     start  layer 0  layer 1  layer 2  end
    chained    start  layer 0  layer 1  layer 1  layer 1  layer 2  end
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evomesh.plan.device import Device
from evomesh.plan.part_trace import PartTrace
from evomesh.plan.simulate import kernel_seconds
from evomesh.plan.timeline import COMPUTE, Event, Kernel, Mark, Transfer, Wait

# Axes of the transfers of a micro-batch: those of FSDP2 are launched on separate streams.
INSIDE = "tp"
SHARDS = "shards"


class PartMark(NamedTuple):
    """A mark as a part knows it: how many parts before it was made, and its number there."""

    parts_before: int
    number: int


class KernelSpan(NamedTuple):
    """Kernels of a stream, one after the other."""

    stream: str
    seconds: float


class TimedTransfer(NamedTuple):
    """A transfer; its time depends on where the ranks of its axis are."""

    stream: str
    operation: str
    axis: str
    nbytes: int
    number: int
    after: tuple[PartMark, ...]


class PartMarkMade(NamedTuple):
    stream: str
    number: int


class PartWait(NamedTuple):
    stream: str
    mark: PartMark


PartItem = KernelSpan | TimedTransfer | PartMarkMade | PartWait
# Of an operation, an axis and bytes.
TransferSeconds = Callable[[str, str, int], float]


@dataclass(frozen=True)
class TimedPart:
    """Items of a part in the order of launch, and seconds by kind of kernel."""

    items: tuple[PartItem, ...]
    busy: dict[str, float]

    def seconds_of(self, stream: str) -> float:
        """Return the seconds of the kernels of a stream."""
        spans = [item for item in self.items if isinstance(item, KernelSpan)]
        return sum(span.seconds for span in spans if span.stream == stream)

    def sent(self, axis: str) -> int:
        """Return the bytes that are sent over an axis."""
        transfers = [item for item in self.items if isinstance(item, TimedTransfer)]
        return sum(one.nbytes for one in transfers if one.axis == axis)


@dataclass(frozen=True)
class ChainTimes:
    """When the parts of a chain end on the compute stream, when all streams do, and how long compute waits."""

    part_ends: list[float]
    end: float
    exposed: float


def time_parts(trace: PartTrace, device: Device, dtype: str) -> dict[str, TimedPart]:
    """Return the parts of a trace with the times of their kernels."""
    timed = {}
    for index, name in enumerate(trace.order):
        marks = _PartMarks(trace, index)
        events = trace.events[name]
        timed[name] = _timed_part(events, marks, device, dtype)
    return timed


class _PartMarks:
    """Finds the parts of marks, as seen from one of them."""

    def __init__(self, trace: PartTrace, index: int) -> None:
        self._starts = [trace.marks[name] for name in trace.order]
        self._index = index

    def find(self, mark: int) -> PartMark:
        # A part begins with the number of marks before it: its own are greater.
        owner = bisect_left(self._starts, mark) - 1
        return PartMark(self._index - owner, mark - self._starts[owner])


def _timed_part(
    events: Sequence[Event], marks: _PartMarks, device: Device, dtype: str
) -> TimedPart:
    items: list[PartItem] = []
    busy: dict[str, float] = {}
    for event in events:
        if isinstance(event, Kernel):
            seconds = kernel_seconds(event, device, dtype)
            _add_kernel(items, event.stream, seconds)
            kind = event.kind.value
            busy[kind] = busy.get(kind, 0.0) + seconds
        else:
            items.append(_timed_item(event, marks))
    return TimedPart(tuple(items), busy)


def _add_kernel(items: list[PartItem], stream: str, seconds: float) -> None:
    last = items[-1] if items else None
    if isinstance(last, KernelSpan) and last.stream == stream:
        items[-1] = KernelSpan(stream, last.seconds + seconds)
    else:
        items.append(KernelSpan(stream, seconds))


def _timed_item(event: Transfer | Mark | Wait, marks: _PartMarks) -> PartItem:
    stream = event.stream
    if isinstance(event, Mark):
        return PartMarkMade(stream, marks.find(event.mark).number)
    if isinstance(event, Wait):
        return PartWait(stream, marks.find(event.mark))
    axis = SHARDS
    if stream == COMPUTE:
        axis = INSIDE
    after = tuple(map(marks.find, event.after))
    call = event.call
    return TimedTransfer(
        stream=stream,
        operation=call.operation,
        axis=axis,
        nbytes=call.nbytes,
        number=marks.find(event.mark).number,
        after=after,
    )


def run_chain(
    parts: Sequence[TimedPart], transfer_seconds: TransferSeconds
) -> ChainTimes:
    """Simulate the streams of a rank that goes through ``parts``, as ``simulate`` does for a whole timeline.

    A mark of a part before the first one has passed.
    """
    ends: dict[str, float] = {COMPUTE: 0.0}
    marks: dict[tuple[int, int], float] = {}
    part_ends = []
    exposed = 0.0
    for index, part in enumerate(parts):
        for item in part.items:
            now = ends.get(item.stream, 0.0)
            if isinstance(item, KernelSpan):
                ends[item.stream] = now + item.seconds
            elif isinstance(item, PartWait):
                until = _time_of(item.mark, index, marks)
                if until > now:
                    ends[item.stream] = until
                    if item.stream == COMPUTE:
                        exposed += until - now
            elif isinstance(item, PartMarkMade):
                marks[index, item.number] = now
            else:
                for mark in item.after:
                    now = max(now, _time_of(mark, index, marks))
                communicator = f"{item.operation} {item.axis}"
                start = max(now, ends.get(communicator, 0.0))
                seconds = transfer_seconds(item.operation, item.axis, item.nbytes)
                ends[communicator] = start + seconds
                marks[index, item.number] = start + seconds
        part_ends.append(ends[COMPUTE])
    return ChainTimes(part_ends, max(ends.values()), exposed)


def _time_of(
    mark: PartMark, index: int, marks: Mapping[tuple[int, int], float]
) -> float:
    return marks.get((index - mark.parts_before, mark.number), 0.0)


def has_same_items(first: TimedPart, second: TimedPart) -> bool:
    """Return whether two parts do the same but for their times."""
    if len(first.items) != len(second.items):
        return False
    for one, other in zip(first.items, second.items, strict=True):
        if type(one) is not type(other) or one.stream != other.stream:
            return False
    return True
