"""``spike``: what counts as a spike of the loss or the gradient norm, and what a run does about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evomesh.config.section import Section

SpikePolicy = Literal["off", "warn", "stop", "skip", "rollback_and_skip"]


class SpikeConfig(Section):
    policy: SpikePolicy = Field(
        "warn",
        description="At a spike: off, warn, stop before the update, skip the update, or rollback_and_skip.",
    )
    zscore: float = Field(
        10.0,
        gt=0,
        description="A loss or gradient norm this many robust standard deviations above the median is a spike.",
    )
    window: int = Field(
        128,
        ge=3,
        description="Updates before a step from which median and deviation are taken.",
    )
    min_steps: int = Field(
        32, ge=3, description="Updates before the first step that can be a spike."
    )
    max_rollbacks: int = Field(
        3, ge=0, description="Rollbacks of a run; at the next spike it stops."
    )
    skip_before: int = Field(
        0,
        ge=0,
        description="Steps before a spike that rollback_and_skip leaves out with it.",
    )

    @property
    def holds_back(self) -> bool:
        """Return whether the update of a spike's step is not made."""
        return self.policy not in ("off", "warn")
