"""Find spikes of loss and gradient norm, decide what is done about them, and keep the decisions.

A step is judged by the updates before it: the value is compared with their median, in
units of their median absolute deviation (Rousseeuw and Croux, 1993), which a few earlier
spikes cannot move. Loss and norm are the same on every rank, so all ranks judge alike
and nothing is communicated. What was judged by is in the checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from evomesh.config.spike import SpikeConfig
from evomesh.monitor.spikes import (
    SPIKES_FILE,
    SpikeLog,
    count_rollbacks,
    left_out_steps,
)
from evomesh.optim.clip import UpdateLimits

logger = logging.getLogger(__name__)

DEVIATION = 1.4826  # standard deviation of a normal distribution, over its median absolute deviation
SMALLEST_SPREAD = (
    0.01  # of the median: equal values before it do not make a step a spike
)
FIGURES = ("loss", "grad_norm")

SpikeAction = Literal["warned", "stopped", "skipped", "rolled back"]
# In words, by action.
OUTCOMES = {
    "stopped": "its update was not made, and the run stops",
    "skipped": "its update is left out, and its packs are not used",
    "rolled back": "the run goes back to the newest checkpoint before it and leaves its packs out",
}


@dataclass(frozen=True)
class FigureScale:
    """The usual values of a figure: their median, and a robust standard deviation."""

    median: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> FigureScale:
        center = median(values)
        distances = [abs(value - center) for value in values]
        deviation = DEVIATION * median(distances)
        smallest = SMALLEST_SPREAD * abs(center)
        return cls(center, max(deviation, smallest))

    def zscore(self, value: float) -> float:
        distance = value - self.median
        if self.deviation == 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / self.deviation


@dataclass(frozen=True)
class SpikeVerdict:
    """A step that is a spike.

    Attributes:
        what: the figures that are too large or not finite.
        zscores, limits, medians: by figure; empty while there are too few updates to compare with.
        window: updates that it was compared with.
    """

    step: int
    what: tuple[str, ...]
    loss: float
    grad_norm: float
    zscores: Mapping[str, float]
    limits: Mapping[str, float]
    medians: Mapping[str, float]
    window: int

    def describe(self) -> str:
        """Return one sentence: which figures, and by how much."""
        parts = []
        for name in self.what:
            value = self.loss if name == "loss" else self.grad_norm
            words = f"{'gradient norm' if name == 'grad_norm' else name} {value:.4g}"
            if math.isfinite(value):
                words += (
                    f", {self.zscores[name]:.1f} deviations above the median {self.medians[name]:.4g} "
                    f"of {self.window} updates"
                )
            parts.append(words)
        return f"step {self.step} is a spike: {'; '.join(parts)}"


@dataclass(frozen=True)
class SpikeFinding:
    """A spike and what is done about it."""

    verdict: SpikeVerdict
    action: SpikeAction
    applied: bool

    @property
    def ends_run(self) -> bool:
        """Return whether this process takes no further step from its present state."""
        return self.action in ("stopped", "rolled back")

    def describe(self) -> str:
        made = "its update was made" if self.applied else "its update was not made"
        return f"{self.verdict.describe()}; {OUTCOMES.get(self.action, made)}"


@dataclass(frozen=True)
class SpikeRollback:
    """The decisions that a run which goes back to a checkpoint takes along into its next start.

    Attributes:
        step: the spike.
        left_out: steps whose packs are not trained on.
        saved: steps of the checkpoints of this run, where others may be in its save folder; None: all are.
    """

    step: int
    left_out: frozenset[int]
    rollbacks: int
    saved: frozenset[int] | None = None


class SpikeDetector:
    """Judges each step by the updates before it.

    Args:
        overflows: an infinite or NaN gradient with a finite loss is usual, as with float16's loss scale.
    """

    def __init__(self, config: SpikeConfig, overflows: bool = False) -> None:
        self.config = config
        self.overflows = overflows
        self.history: deque[tuple[float, float]] = deque(maxlen=config.window)

    def scales(self) -> dict[str, FigureScale]:
        """Return the usual values of each figure; none while there are too few updates."""
        if len(self.history) < min(self.config.min_steps, self.config.window):
            return {}
        columns = zip(*self.history, strict=True)
        pairs = zip(FIGURES, columns, strict=True)
        return {name: FigureScale.of(values) for name, values in pairs}

    def limits(self) -> UpdateLimits:
        """Return the largest loss and norm of the next step that are no spike."""
        limits = self._limits(self.scales())
        return UpdateLimits(
            norm=limits.get("grad_norm", math.inf),
            loss=limits.get("loss", math.inf),
            overflows=self.overflows,
        )

    def _limits(self, scales: Mapping[str, FigureScale]) -> dict[str, float]:
        limits = {}
        for name, scale in scales.items():
            limits[name] = scale.median + self.config.zscore * scale.deviation
        return limits

    def judge(self, step: int, loss: float, grad_norm: float) -> SpikeVerdict | None:
        """Return the verdict on a step that is a spike, None on any other; remembers nothing."""
        scales = self.scales()
        limits = self._limits(scales)
        values = {"loss": loss, "grad_norm": grad_norm}
        is_overflow = self.overflows and math.isfinite(loss)
        what = []
        for name, value in values.items():
            is_usual = name == "grad_norm" and is_overflow
            if not math.isfinite(value) and is_usual:
                continue
            if not math.isfinite(value) or value > limits.get(name, math.inf):
                what.append(name)
        if not what:
            return None
        zscores = {name: scale.zscore(values[name]) for name, scale in scales.items()}
        return SpikeVerdict(
            step,
            tuple(what),
            loss,
            grad_norm,
            zscores=zscores,
            limits=limits,
            medians={name: scale.median for name, scale in scales.items()},
            window=len(self.history),
        )

    def add(self, loss: float, grad_norm: float) -> None:
        """Remember the figures of a step that was an update."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.history.append((loss, grad_norm))


class SpikeWatch:
    """Judges the steps of a run, and keeps what was decided; all ranks decide alike.

    Args:
        rows: lines of the run's ``spikes.jsonl`` so far, the same on all ranks.

    Attributes:
        left_out: steps whose packs are not trained on, past and future.
        log: of the main rank; writes nothing on others.
    """

    def __init__(
        self,
        config: SpikeConfig,
        overflows: bool = False,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.config = config
        self.detector = SpikeDetector(config, overflows)
        self.left_out = left_out_steps(rows)
        self.rollbacks = count_rollbacks(rows)
        self.log = SpikeLog(None)

    def limits(self) -> UpdateLimits | None:
        """Return what the optimizer holds the next step's update back for; None: only for what is not finite."""
        return self.detector.limits() if self.config.holds_back else None

    def after_step(
        self, step: int, loss: float, grad_norm: float, applied: bool
    ) -> SpikeFinding | None:
        """Judge a step and decide; None if it is not a spike.

        Args:
            applied: its update was made.
        """
        verdict = None
        if self.config.policy != "off":
            verdict = self.detector.judge(step, loss, grad_norm)
        if applied:
            self.detector.add(loss, grad_norm)
        if verdict is None:
            return None
        action = self._action()
        steps = self._steps_left_out(step, action)
        self.left_out |= set(steps)
        self.rollbacks += action == "rolled back"
        finding = SpikeFinding(verdict, action, applied)
        self.log.write(self._row(finding, steps))
        return finding

    def _action(self) -> SpikeAction:
        policy = self.config.policy
        if policy == "skip":
            return "skipped"
        if policy == "rollback_and_skip":
            has_more = self.rollbacks < self.config.max_rollbacks
            return "rolled back" if has_more else "stopped"
        return "stopped" if policy == "stop" else "warned"

    def _steps_left_out(self, step: int, action: SpikeAction) -> list[int]:
        if action == "rolled back":
            return list(range(max(0, step - self.config.skip_before), step + 1))
        return [step] if action == "skipped" else []

    def _row(self, finding: SpikeFinding, steps: list[int]) -> dict[str, Any]:
        verdict = finding.verdict
        return {
            "event": "spike",
            "step": verdict.step,
            "what": list(verdict.what),
            "loss": verdict.loss,
            "grad_norm": verdict.grad_norm,
            "zscore": dict(verdict.zscores),
            "limit": dict(verdict.limits),
            "median": dict(verdict.medians),
            "window": verdict.window,
            "applied": finding.applied,
            "policy": self.config.policy,
            "action": finding.action,
            "left_out": steps,
        }

    def consecutive_skips(self, step: int) -> int:
        """Return how many steps in a row, up to ``step``, are left out."""
        count = 0
        while step - count in self.left_out:
            count += 1
        return count

    def open_log(self, folder: Path, *, is_main: bool, continues: bool) -> None:
        """Begin to write into the run folder.

        Args:
            continues: the run continues an earlier start that wrote there.
        """
        self.log = SpikeLog(folder / SPIKES_FILE if is_main else None)
        if not continues:
            self.log.begin()

    def rollback(self, step: int, saved: Sequence[int] | None) -> SpikeRollback:
        """Return what the next start takes along from here."""
        own = None if saved is None else frozenset(saved)
        return SpikeRollback(step, frozenset(self.left_out), self.rollbacks, own)

    def continue_after(self, rollback: SpikeRollback, step: int) -> None:
        """Take over the decisions of the start that went back, and note that the run continues with ``step``."""
        self.left_out |= rollback.left_out
        self.rollbacks = max(self.rollbacks, rollback.rollbacks)
        left_out = [one for one in sorted(rollback.left_out) if one >= step]
        row = {"step": rollback.step, "to": step, "left_out": left_out}
        self.log.write({"event": "rollback", **row})

    def state(self) -> dict[str, Any]:
        """Return what the next steps are judged by, and the decisions so far, as JSON for a checkpoint."""
        return {
            "history": [list(figures) for figures in self.detector.history],
            "left_out": sorted(self.left_out),
            "rollbacks": self.rollbacks,
        }

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over what ``state`` returned; checkpoints of earlier versions have nothing."""
        if state is None:
            return
        history = self.detector.history
        history.clear()
        for loss, grad_norm in state["history"]:
            figures = (float(loss), float(grad_norm))
            history.append(figures)
        self.left_out |= set(state["left_out"])
        rollbacks = int(state["rollbacks"])
        self.rollbacks = max(self.rollbacks, rollbacks)
