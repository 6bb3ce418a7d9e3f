"""A stage of any depth, made of the parts of small models: its times, and the bytes alive in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evomesh.plan.memory import Peak
from evomesh.plan.part_time import (
    ChainTimes,
    TimedPart,
    TransferSeconds,
    run_chain,
)
from evomesh.plan.part_trace import (
    B_END,
    B_START,
    F_END,
    F_LOSS,
    F_START,
    PartBytes,
    SlotShape,
    backward_of,
    forward_of,
)


@dataclass(frozen=True)
class ShardParts:
    """The parts of a small model of ``depth`` layers on one device."""

    timed: dict[str, TimedPart]
    nbytes: dict[str, PartBytes]
    slots: list[SlotShape]
    message: int
    depth: int


class LayerPart(NamedTuple):
    """A layer of a stage: which one of which small model is like it."""

    source: ShardParts
    layer: int


@dataclass(frozen=True)
class StageMakeup:
    """Parts of a stage: its start and end, each with or without an end of the model, and its layers."""

    start: ShardParts
    layers: tuple[LayerPart, ...]
    end: ShardParts

    def forward(self, transfer_seconds: TransferSeconds) -> ChainTimes:
        return run_chain(self._forward_parts(), transfer_seconds)

    def backward(self, transfer_seconds: TransferSeconds) -> ChainTimes:
        return run_chain(self._backward_parts(), transfer_seconds)

    def parts(self) -> Iterator[TimedPart]:
        """Yield all parts of a micro-batch."""
        yield from self._forward_parts()
        yield from self._backward_parts()

    def _forward_parts(self) -> list[TimedPart]:
        parts = [self.start.timed[F_START]]
        for source, layer in self.layers:
            parts.append(source.timed[forward_of(layer)])
        parts.append(self.end.timed[F_END])
        parts.append(self.end.timed[F_LOSS])
        return parts

    def _backward_parts(self) -> list[TimedPart]:
        """Return the parts of backward, the last of which is that of the stage's start."""
        parts = []
        end = self.end.timed
        start = self.start.timed
        if B_END in end:
            parts.append(end[B_END])
        for source, layer in reversed(self.layers):
            name = backward_of(layer)
            parts.append(source.timed[name])
        if B_START in start:
            parts.append(start[B_START])
        return parts

    def slots_in_backward(self) -> Iterator[list[SlotShape]]:
        """Yield the parameters whose gradients each part of backward completes, in the order of backward."""
        ends = _slots_of(self.end, "end")
        if B_END in self.end.timed:
            yield ends
            ends = []
        for source, layer in reversed(self.layers):
            yield ends + _slots_of(source, str(layer))
            ends = []
        if B_START in self.start.timed:
            yield _slots_of(self.start, "start")


def _slots_of(source: ShardParts, part: str) -> list[SlotShape]:
    """Return the parameters of a part, the last one first."""
    slots = [slot for slot in source.slots if slot.part == part]
    return slots[::-1]


@dataclass(frozen=True)
class StageBytes:
    """Bytes of one micro-batch in a stage.

    Attributes:
        kept: activations that it keeps for backward.
        forward: the most that is alive in forward and loss.
        backward: the most that is alive in each part of backward.
    """

    kept: int
    forward: Peak
    backward: list[Peak]


def stage_bytes(makeup: StageMakeup) -> StageBytes:
    """Return what is alive in a stage, from what is alive in the small models it is made of."""
    start = makeup.start.nbytes
    end = makeup.end.nbytes

    # 1. Forward: what is kept adds up.
    kept = start[F_START].kept
    peaks = [start[F_START].most]
    in_backward = []
    for source, layer in makeup.layers:
        part = source.nbytes[forward_of(layer)]
        peak = part.most.with_bytes(kept)
        peaks.append(peak)
        kept += part.kept
        # Backward begins with what the layers up to this one have kept.
        part = source.nbytes[backward_of(layer)]
        peak = part.most.with_bytes(kept)
        in_backward.append(peak)
    peak = end[F_END].most.with_bytes(kept)
    peaks.append(peak)
    kept += end[F_END].kept
    peak = end[F_LOSS].most.with_bytes(kept)
    peaks.append(peak)

    # 2. Backward, in its order.
    in_backward.reverse()
    if B_END in end:
        first = end[B_END].most.with_bytes(kept)
        in_backward.insert(0, first)
    if B_START in start:
        in_backward.append(start[B_START].most)
    return StageBytes(kept, highest(peaks), in_backward)


def highest(peaks: Sequence[Peak]) -> Peak:
    return max(peaks, key=lambda peak: peak.nbytes)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch in a stage.

    Attributes:
        backward_ends: when each part of backward ends.
        exposed: in which compute waits for collectives.
        busy: by kind of kernel.
    """

    forward: float
    backward: float
    backward_ends: list[float]
    exposed: float
    busy: dict[str, float]

    @classmethod
    def of(cls, makeup: StageMakeup, transfer_seconds: TransferSeconds) -> StageTimes:
        forward = makeup.forward(transfer_seconds)
        backward = makeup.backward(transfer_seconds)
        busy: dict[str, float] = {}
        for part in makeup.parts():
            for kind, seconds in part.busy.items():
                busy[kind] = busy.get(kind, 0.0) + seconds
        return cls(
            forward=forward.end,
            backward=backward.end,
            backward_ends=backward.part_ends,
            exposed=forward.exposed + backward.exposed,
            busy=busy,
        )
