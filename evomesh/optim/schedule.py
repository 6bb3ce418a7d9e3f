"""Learning rate and beta2 as pure functions of the number of updates already made.

There is no scheduler object and no state to save: a resumed run computes the same
values as an uninterrupted one. A new shape is one function, one line in ``SHAPES``, and
its name in ``ScheduleType`` (``config/lr_scheduler.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from evomesh.config.lr_scheduler import DecayType, LrConfig, ScheduleType
from evomesh.config.schema import AdamConfig, Beta2Config

WITHOUT_WARMUP = 10000  # timescale of the power laws


@dataclass(frozen=True)
class ScheduleStep:
    """An update after the warm-up, and what the shapes know of it.

    Attributes:
        step: updates since the warm-up, from 0.
        progress: fraction of the steps after the warm-up that are over; 1 from the end on.
        peak: rate at the end of the warm-up.
        floor: ``eta_min``.
        timescale: of the power laws, in updates.
        power: exponent of ``power``.
    """

    step: int
    progress: float
    peak: float
    floor: float
    timescale: int
    power: float


def learning_rate(
    step: int, config: LrConfig, adam: AdamConfig, total_steps: int
) -> float:
    """Return the learning rate: 0 for ``init_steps``, linear up to ``adam.lr``, then the shape of ``config.type``.

    A shape with a decay (``config.decay_span``) falls from the rate where it begins to
    ``eta_min``. With ``warmup_start``, the line of the warm-up starts at that fraction of
    ``adam.lr``, as mmengine's LinearLR does.

    Args:
        step: successful updates before this one, from 0; the first update of the warm-up uses ``lr / warmup``.
        total_steps: length of the run, unless ``config.total_steps`` is set; after it the rate stays where it ended.
    """
    warmup = config.warmup_updates(total_steps)
    since_start = step - config.init_steps
    if since_start < 0:
        return 0.0
    if since_start < warmup:
        return adam.lr * _warmup_factor(since_start, warmup, config.warmup_start)
    decay = config.decay_span(total_steps)
    if decay is None or step < decay.start:
        return _shape_rate(step, config, adam, total_steps)
    top = _shape_rate(decay.start, config, adam, total_steps)
    since_decay = step - decay.start
    progress = min(since_decay / decay.steps, 1.0)
    decay_shape = DECAYS[config.decay_type]
    factor = decay_shape(progress)
    return config.eta_min + (top - config.eta_min) * factor


def _shape_rate(
    step: int, config: LrConfig, adam: AdamConfig, total_steps: int
) -> float:
    """Return the rate of an update after the warm-up, without the decay at the end."""
    warmup = config.warmup_updates(total_steps)
    since_warmup = step - config.init_steps - warmup
    length = config.length(total_steps) - config.init_steps - warmup
    progress = 1.0
    if length > 0:
        progress = min(since_warmup / length, 1.0)
    place = ScheduleStep(
        step=since_warmup,
        progress=progress,
        peak=adam.lr,
        floor=config.eta_min,
        timescale=config.timescale or warmup or WITHOUT_WARMUP,
        power=config.power,
    )
    return SHAPES[config.type](place)


def _warmup_factor(step: int, warmup: int, start: float | None) -> float:
    """Return the fraction of the peak rate in a step of the warm-up; the last one has 1."""
    if start is None:
        return (step + 1) / warmup
    return start + (1 - start) * step / (warmup - 1) if warmup > 1 else 1.0


def _cosine(place: ScheduleStep) -> float:
    """Return half a cosine from the peak to the floor (Loshchilov and Hutter, arXiv 1608.03983)."""
    cosine = 1 + math.cos(math.pi * place.progress)  # from 2 down to 0
    return place.floor + (place.peak - place.floor) * cosine / 2


def _constant(place: ScheduleStep) -> float:
    return place.peak


def _linear(place: ScheduleStep) -> float:
    return place.floor + (place.peak - place.floor) * (1 - place.progress)


def _inverse_sqrt(place: ScheduleStep) -> float:
    """Return the rate of Vaswani et al., arXiv 1706.03762: it falls as 1 / sqrt(step)."""
    return _power_law(place, 0.5)


def _power(place: ScheduleStep) -> float:
    """Return a power law, as of the power scheduler (Shen et al., arXiv 2408.13359), here of the step."""
    return _power_law(place, place.power)


def _power_law(place: ScheduleStep, exponent: float) -> float:
    """Return peak (1 + step / timescale)^-exponent, at least the floor unless that is above the peak."""
    fallen = place.peak * math.pow(1 + place.step / place.timescale, -exponent)
    lowest = min(place.floor, place.peak)
    return max(fallen, lowest)


def _linear_decay(progress: float) -> float:
    return 1 - progress


def _cosine_decay(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _sqrt_decay(progress: float) -> float:
    """Return 1 - sqrt(progress) (Hägele et al., arXiv 2405.18392)."""
    return 1 - math.sqrt(progress)


SHAPES: Mapping[ScheduleType, Callable[[ScheduleStep], float]] = MappingProxyType(
    {
        "cosine": _cosine,
        "wsd": _constant,  # its decay is that of `decay_span`
        "constant": _constant,
        "linear": _linear,
        "inverse_sqrt": _inverse_sqrt,
        "power": _power,
    }
)
DECAYS: Mapping[DecayType, Callable[[float], float]] = MappingProxyType(
    {"linear": _linear_decay, "cosine": _cosine_decay, "1-sqrt": _sqrt_decay}
)


def preview_steps(config: LrConfig, first: int, total_steps: int) -> list[int]:
    """Return updates at which a table shows the rate: the borders of the schedule, and some between them.

    Args:
        first: the first update of the table.
        total_steps: length of the run.
    """
    warmup_end = config.init_steps + config.warmup_updates(total_steps)
    decay = config.decay_span(total_steps)
    decay_start = total_steps if decay is None else decay.start
    last = total_steps - 1
    shown = {
        first,
        last,
        *_quarters(warmup_end, decay_start),
        *_quarters(decay_start, total_steps),
    }
    return sorted(step for step in shown if first <= step <= last)


def _quarters(start: int, stop: int) -> list[int]:
    """Return the start and the quarters of a range of updates."""
    length = stop - start
    return [start + length * quarter // 4 for quarter in range(4)]


def beta2(step: int, config: Beta2Config, adam: AdamConfig) -> float:
    """Return max(initial, 1 - n^-c), n = ``step`` + 1 (Shazeer and Stern, arXiv 1804.04235); the initial for c <= 0."""
    initial = adam.adam_beta2 if config.init_beta2 is None else config.init_beta2
    c = adam.adam_beta2_c if config.c is None else config.c
    if c <= 0:
        return initial
    grown: float = 1 - (step + 1) ** -c
    return max(initial, grown)
