"""Time and memory of a rank at any depth, on the line through two small depths: each layer adds the same."""

from __future__ import annotations

from evomesh.plan.memory import Peak, TracedMemory
from evomesh.plan.pipeline_time import StageSeconds
from evomesh.plan.step_time import RankSeconds

# Layers of a stage; all functions here are given what was found at the first and at the
# second.
SMALL_DEPTHS = (1, 2)


def bytes_at_depth(
    one: dict[str, int], two: dict[str, int], depth: float
) -> dict[str, int]:
    """Return bytes by kind of a rank whose stages have ``depth`` layers."""
    return {kind: _bytes(one[kind], two[kind], depth) for kind in one}


def memory_at_depth(
    one: TracedMemory, two: TracedMemory, depth: float, micro_batches: int
) -> TracedMemory:
    """Return what a rank holds whose stages have ``depth`` layers, with ``micro_batches`` in flight."""
    peaks = {}
    for phase, shallow in one.peaks.items():
        deeper = two.peaks[phase]
        peaks[phase] = Peak(
            nbytes=_bytes(shallow.nbytes, deeper.nbytes, depth),
            gathered=_bytes(shallow.gathered, deeper.gathered, depth),
        )
    return TracedMemory(
        held=bytes_at_depth(one.held, two.held, depth),
        kept=_bytes(one.kept, two.kept, depth),
        peaks=peaks,
        micro_batches=micro_batches,
    )


def seconds_at_depth(one: RankSeconds, two: RankSeconds, depth: float) -> RankSeconds:
    """Return the times of a rank whose stages have ``depth`` layers."""
    stages = {}
    for stage, shallow in one.stages.items():
        deeper = two.stages[stage]
        stages[stage] = StageSeconds(
            forward=_line(shallow.forward, deeper.forward, depth),
            backward=_line(shallow.backward, deeper.backward, depth),
        )
    busy = {}
    for what, seconds in one.busy.items():
        with_more_layers = two.busy.get(what, seconds)
        busy[what] = _line(seconds, with_more_layers, depth)
    micro_batch = _line(one.micro_batch, two.micro_batch, depth)
    exposed = _growing(one.exposed, two.exposed, depth)
    last = _growing(one.last, two.last, depth)
    return RankSeconds(
        stages=stages,
        micro_batch=micro_batch,
        exposed=exposed,
        last=last,
        busy=busy,
    )


def _line(one: float, two: float, depth: float) -> float:
    growth = two - one
    return one + growth * (depth - 1)


def _bytes(one: int, two: int, depth: float) -> int:
    return round(_line(one, two, depth))


def _growing(one: float, two: float, depth: float) -> float:
    """Return the wait at ``depth``; where more layers hide more of it, the one at 2."""
    growth = max(two - one, 0.0)
    return two + growth * (depth - 2)
