"""``data.stop_when``: end a run whose validation no longer improves."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from evomesh.config.data import StopWhenConfig
from evomesh.errors import UserError


class EarlyStop:
    """Counts the validations since a figure was best; all ranks count the same figures.

    Args:
        config: None never ends a run.
        figures: names that a validation of the run gives.
        task_figures: names that its benchmark tasks give, and whether a higher value is better.

    Raises:
        UserError: the figure is none of them.
    """

    def __init__(
        self,
        config: StopWhenConfig | None,
        figures: Collection[str] = (),
        task_figures: Mapping[str, bool] | None = None,
    ) -> None:
        self.config = config
        self.task_figures = task_figures or {}
        figures = (*figures, *self.task_figures)
        self.best: float | None = None
        self.since_best = 0  # validations
        if config is not None and config.metric not in figures:
            raise UserError(
                f"no validation of this run gives {config.metric!r}",
                where="data.stop_when.metric",
                expected=f"one of {', '.join(figures)}"
                if figures
                else "a validation set: data.valid_folder and data.valid_every",
                code="EVO-TRAIN-008",
            )

    @property
    def is_due(self) -> bool:
        return self.config is not None and self.since_best >= self.config.patience

    @property
    def reason(self) -> str:
        assert self.config is not None and self.best is not None
        return (
            f"{self.config.metric} has not improved on {self.best:.6g} by more than {self.config.min_delta:g} "
            f"in {self.since_best} validations (data.stop_when)"
        )

    def after_validation(self, results: Mapping[str, float]) -> None:
        """Count one validation."""
        if self.config is None or self.config.metric not in results:
            return
        value = results[self.config.metric]
        if self._is_better(value):
            self.best = value
            self.since_best = 0
        else:
            self.since_best += 1

    def _is_better(self, value: float) -> bool:
        """Return whether a value improves on the best one by more than it must."""
        assert self.config is not None
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        # Accuracy grows as it improves, everything else falls.
        metric = self.config.metric
        is_growing = self.task_figures.get(metric, metric.endswith("_acc"))
        gain = value - self.best
        if not is_growing:
            gain = -gain
        return gain > self.config.min_delta

    def state(self) -> dict[str, Any]:
        """Return the counts as JSON for a checkpoint."""
        return {"best": self.best, "since_best": self.since_best}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over what ``state`` returned; checkpoints of earlier versions have nothing."""
        if state is not None:
            self.best = state["best"]
            self.since_best = int(state["since_best"])
