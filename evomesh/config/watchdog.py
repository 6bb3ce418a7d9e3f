"""``monitor.watchdog``: when a rank counts as stuck."""

from __future__ import annotations

from pydantic import Field

from evomesh.config.section import Section


class WatchdogConfig(Section):
    enable: bool = Field(
        True,
        description="Watch for ranks that make no progress: one sentence names the rank, its place and its Python "
        "stack, and the run ends with exit code 75. Linux only.",
    )
    silence: float = Field(
        10.0,
        gt=0,
        description="Seconds without progress, and at least watchdog.steps median steps, after which a rank is stuck.",
    )
    steps: float = Field(
        3.0, gt=0, description="Median steps without progress; see watchdog.silence."
    )
    long_phase: float = Field(
        1800.0,
        gt=0,
        description="Seconds without progress allowed in the start, the first step, validation, saves, slow reading "
        "and compilation.",
    )
