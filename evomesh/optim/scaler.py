"""Dynamic loss scale: keeps float16 gradients out of the subnormals (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

from typing import Any

from evomesh.config.schema import DType, ScalerConfig
from evomesh.optim.clip import GradientCheck


class LossScaler:
    """The scale of float16 training; 1 for ever in every other dtype, which has float32's range of exponents.

    ``hysteresis`` overflows since the last growth back the scale off for the first time, each further one again;
    ``growth_interval`` good steps in a row grow it. NaN counts as overflow: inf - inf and 0 * inf are what overflow
    inside the model looks like from here.
    """

    def __init__(self, config: ScalerConfig, dtype: DType) -> None:
        self.config = config
        self.active = dtype == "float16"
        self.scale = self._clamp(config.fp16.initial_scale) if self.active else 1.0
        self.good_steps = 0
        self.overflows = 0

    @property
    def at_floor(self) -> bool:
        """The scale cannot get smaller: further overflows will not cure themselves."""
        floor = self.config.fp16.min_scale
        return self.active and floor is not None and self.scale <= floor

    def update(self, found: GradientCheck) -> None:
        if not self.active:
            return
        if found == "ok":
            self.good_steps += 1
            if self.good_steps >= self.config.fp16.growth_interval:
                self.good_steps = self.overflows = 0
                self.scale = self._clamp(self.scale * self.config.growth_factor)
        else:
            self.good_steps = 0
            self.overflows += 1
            if self.overflows >= self.config.hysteresis:
                self.scale = self._clamp(self.scale * self.config.backoff_factor)

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over a saved state; without effect when this run needs no scale."""
        if self.active:
            self.scale = self._clamp(float(state["scale"]))
            self.good_steps, self.overflows = int(state["good_steps"]), int(state["overflows"])

    def _clamp(self, scale: float) -> float:
        low, high = self.config.fp16.min_scale, self.config.max_scale
        return max(low or 0.0, min(scale, high or float("inf")))
