"""The ``lr_scheduler`` section of a config: warm-up, shape and decay of the learning rate.

The rates themselves are computed in ``optim/schedule.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from evomesh.config.section import Section

ScheduleType = Literal["cosine", "wsd", "constant", "linear", "inverse_sqrt", "power"]
DecayType = Literal["linear", "cosine", "1-sqrt"]
# They fall by themselves, over the whole run: a decay at the end would come twice.
FALLING = ("cosine", "linear")
# These fall without an end, by a power of the step.
POWER_LAWS = ("inverse_sqrt", "power")
WSD_DECAY_RATIO = 0.1
# A checkpoint's path: FOLDER/5000, or FOLDER/step-00005000.ATTEMPT
STEP_IN_PATH = re.compile(r"[/\\:](?:step-)?(\d+)(?:\.[^/\\]*)?[/\\]*$")


@dataclass(frozen=True)
class DecaySpan:
    """The updates over which the rate falls to its end: ``steps`` of them, from ``start`` on."""

    start: int
    steps: int


class LrConfig(Section):
    """``lr_scheduler``: linear warm-up, then one of several shapes."""

    type: ScheduleType = Field(
        "cosine",
        description="Shape after the warm-up: cosine, wsd (constant, then a decay), constant, linear, inverse_sqrt, "
        "power.",
    )
    total_steps: int | None = Field(
        None,
        ge=1,
        description="Length of the learning-rate schedule; None: data.total_steps.",
    )
    init_steps: int = Field(0, ge=0, description="Steps before the warm-up.")
    warmup_ratio: float = Field(
        0.0, ge=0, le=1, description="Fraction of the steps that warm up."
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="Steps that warm up; None: warmup_ratio of all steps.",
    )
    warmup_start: float | None = Field(
        None,
        ge=0,
        le=1,
        description="First rate of the warm-up, as a fraction of the peak; None: one step's.",
    )
    eta_min: float = Field(0.0, ge=0, description="Learning rate at the end.")
    decay_type: DecayType = Field(
        "linear",
        description="Shape of the decay: linear, cosine, or 1-sqrt, which falls fast at first.",
    )
    decay_steps: int | None = Field(
        None,
        ge=1,
        description="Last steps of the run, over which the rate decays to eta_min; None: decay_ratio of all steps.",
    )
    decay_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Fraction of the steps that decay at the end; None: 0.1 with wsd, else none.",
    )
    decay_from: int | str | None = Field(
        None,
        description="Decay from here: the step after which the rate decays over decay_steps, where the run then ends, "
        "whatever the type and data.total_steps; or a checkpoint FOLDER/STEP, which this run branches from.",
    )
    power: float = Field(
        0.51,
        gt=0,
        description="Exponent p of type power: the rate falls as (1 + steps / timescale) ** -p.",
    )
    timescale: int | None = Field(
        None,
        ge=1,
        description="Scale in steps of inverse_sqrt and power; None: the length of the warm-up, 10000 without one.",
    )
    last_epoch: int = Field(
        -1,
        description="Accepted for InternEvo; a resumed run takes the step from its checkpoint.",
    )

    @property
    def branch(self) -> str | None:
        """Return the checkpoint that the run branches from, None without one."""
        return self.decay_from if isinstance(self.decay_from, str) else None

    @property
    def decay_start(self) -> int | None:
        """Return the step of ``decay_from``; None without one, or if its path does not end in a step."""
        if not isinstance(self.decay_from, str):
            return self.decay_from
        match = STEP_IN_PATH.search(self.decay_from)
        return int(match[1]) if match else None

    def length(self, run_steps: int) -> int:
        """Return the steps of the schedule in a run of ``run_steps``."""
        return self.total_steps or run_steps

    def warmup_updates(self, run_steps: int) -> int:
        """Return how many updates warm up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return int(self.length(run_steps) * self.warmup_ratio)

    def decay_span(self, run_steps: int) -> DecaySpan | None:
        """Return which updates decay, None if the shape has no decay at its end."""
        length = self.length(run_steps)
        steps = self.decay_steps
        if steps is None:
            default = WSD_DECAY_RATIO if self.type == "wsd" else 0.0
            ratio = default if self.decay_ratio is None else self.decay_ratio
            steps = int(length * ratio)
        if steps == 0:
            return None
        start = length - steps if self.decay_start is None else self.decay_start
        return DecaySpan(start, steps)
