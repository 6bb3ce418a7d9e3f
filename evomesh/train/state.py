"""Counters of a run: the part of a checkpoint that is neither weights nor data position."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class TrainState:
    """Counters of one run.

    Attributes:
        step: batches taken so far, which is also the number of the next step; bounded by ``data.total_steps``.
        step_count: successful updates; learning rate and beta2 are functions of it.
        num_consumed_tokens: tokens of all steps tried, over all data-parallel ranks.
        inf_nan_skip_batches: steps skipped because their gradient was not finite.
        consecutive_skips: how many of the latest steps were skipped in a row.
        run_folder: folder of log, metrics and TensorBoard files; a resumed run continues in it.
    """

    step: int = 0
    step_count: int = 0
    num_consumed_tokens: int = 0
    inf_nan_skip_batches: int = 0
    consecutive_skips: int = 0
    run_folder: str = ""

    def record_step(self, tokens: int, applied: bool) -> None:
        """Count one step that was tried with ``tokens`` tokens over all ranks."""
        self.num_consumed_tokens += tokens
        if applied:
            self.step_count += 1
            self.consecutive_skips = 0
        else:
            self.inf_nan_skip_batches += 1
            self.consecutive_skips += 1

    def state(self) -> dict[str, Any]:
        """Return the counters as JSON for a checkpoint."""
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` returned."""
        for field in fields(self):
            setattr(self, field.name, state[field.name])
