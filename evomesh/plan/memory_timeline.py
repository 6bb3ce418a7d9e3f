"""Memory of one rank over one training step, by kind: what ``evomesh plan --json`` holds and a page can stack.

``evomesh plan CONFIG --gpus N --json`` has it as ``memory_timeline``, in JSON:

    rank            the rank that was traced
    kinds           names of the layers of the stack, from the bottom: what is alive all the time comes first
    positions       of each point, ascending: how many events (a tensor's birth, end or new size) came before
    bytes           for each kind a list of bytes, one for each point
    peak            index of the highest point
    parts           stretches of the step, in order: name, begin, end; the latter two are positions
    micro_batches   how many the traced step has; further ones would repeat those in the middle
    outside         bytes by name that no tensor has, estimated: CUDA's context, NCCL's buffers, the allocator's slack

A position is no time: a large product and a small copy are one event each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

# Each of so many equal stretches of events keeps its highest and its lowest point.
STRETCHES = 200


@dataclass(frozen=True)
class MemoryPart:
    """A stretch of a step from one position up to another.

    Attributes:
        name: "forward", "loss", "transfer" (to the next stage), "backward" or "update".
    """

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class MemoryTimeline:
    """Bytes by kind at the points of a step.

    Attributes:
        rank, kinds, positions, nbytes, peak, parts, micro_batches, outside: as at the top of the file.
    """

    rank: int
    kinds: tuple[str, ...]
    positions: tuple[int, ...]
    nbytes: tuple[tuple[int, ...], ...]
    peak: int
    parts: tuple[MemoryPart, ...]
    micro_batches: int
    outside: dict[str, int]

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes by kind at the highest point, without kinds that have none there."""
        found = {}
        for kind, series in zip(self.kinds, self.nbytes, strict=True):
            if series[self.peak]:
                found[kind] = series[self.peak]
        return found

    @property
    def peak_part(self) -> str:
        """Name of the part with the highest point."""
        position = self.positions[self.peak]
        name = ""
        for part in self.parts:
            if part.begin <= position:
                name = part.name
        return name

    def facts(self) -> dict[str, Any]:
        """Return the timeline as JSON."""
        facts = asdict(self)
        facts["bytes"] = facts.pop("nbytes")
        return facts


class StackPoint(NamedTuple):
    """Bytes of each kind from a position on."""

    position: int
    nbytes: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.nbytes)


@dataclass(frozen=True)
class MemoryChange:
    """A change of the bytes of one kind at a position."""

    position: int
    kind: str
    growth: int


def stack_changes(
    changes: Sequence[MemoryChange], kinds: Sequence[str]
) -> list[StackPoint]:
    """Return the bytes of each kind after every position at which some changed, compressed; the highest point stays.

    Args:
        changes: in the order of their positions.
    """
    now = dict.fromkeys(kinds, 0)
    points: dict[int, StackPoint] = {}
    for change in changes:
        now[change.kind] += change.growth
        nbytes = tuple(now.values())
        point = StackPoint(change.position, nbytes)
        points[change.position] = point
    in_order = list(points.values())
    return _compressed(in_order)


def _compressed(points: list[StackPoint]) -> list[StackPoint]:
    """Keep the highest and the lowest point of each of ``STRETCHES`` stretches, in their order."""
    count = len(points)
    length = math.ceil(count / STRETCHES)
    kept = []
    for start in range(0, count, length):
        stop = start + length
        stretch = points[start:stop]
        kept += _extremes(stretch)
    return kept


def _extremes(stretch: list[StackPoint]) -> list[StackPoint]:
    highest = max(stretch, key=_total)
    lowest = min(stretch, key=_total)
    both = {highest, lowest}
    return sorted(both)


def _total(point: StackPoint) -> int:
    return point.total
