"""Dynamic loss scale, which keeps float16 gradients out of the subnormals (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

from typing import Any

from evomesh.config.schema import DType, ScalerConfig
from evomesh.optim.clip import GradientCheck


class LossScaler:
    """The loss scale of float16 training; always 1 in other dtypes, whose exponents have at least float32's range.

    After ``hysteresis`` overflows since the last growth the scale backs off, and again
    on every further overflow. It grows after ``growth_interval`` consecutive good
    steps. NaN counts as overflow, because an overflow inside the model reaches the
    gradient as inf - inf or 0 * inf.
    """

    def __init__(self, config: ScalerConfig, dtype: DType) -> None:
        self.config = config
        self.active = dtype == "float16"
        self.scale = self._clamp(config.fp16.initial_scale) if self.active else 1.0
        self.good_steps = 0
        self.overflows = 0

    def update(self, found: GradientCheck) -> None:
        """Count a step, and change the scale where it is time to."""
        if not self.active:
            return
        if found == "ok":
            self.good_steps += 1
            if self.good_steps >= self.config.fp16.growth_interval:
                self.good_steps = 0
                self.overflows = 0
                self.scale = self._clamp(self.scale * self.config.growth_factor)
            return
        # Overflows are counted until the next growth, not until the next good step: with
        # a hysteresis of 2 a single one leaves the scale, the second lowers it.
        self.good_steps = 0
        self.overflows += 1
        if self.overflows >= self.config.hysteresis:
            self.scale = self._clamp(self.scale * self.config.backoff_factor)

    def state(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "good_steps": self.good_steps,
            "overflows": self.overflows,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a saved state; does nothing if this run needs no scale."""
        if self.active:
            self.scale = self._clamp(float(state["scale"]))
            self.good_steps = int(state["good_steps"])
            self.overflows = int(state["overflows"])

    def _clamp(self, scale: float) -> float:
        low = self.config.fp16.min_scale or 0.0
        high = self.config.max_scale or float("inf")
        return max(low, min(scale, high))
