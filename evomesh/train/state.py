"""Counters of a run: the part of a checkpoint that is neither weights nor data position."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError


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


def check_counters(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose stored state cannot continue a run, so that the one before it is used.

    Raises:
        CheckpointError: a part is missing, or a counter is not one.
    """
    state = checkpoint.state
    train = state.get("train")
    optimizer = state.get("optimizer")
    if not all(
        isinstance(part, dict) for part in (train, optimizer, state.get("scaler"))
    ):
        raise CheckpointError(
            "it has no counters of a training, as weights that were imported have none: it cannot resume a run",
            where=checkpoint.folder,
            fix="start anew from its weights: auto_resume=False, "
            f'load_ckpt_info=dict(path="{checkpoint.folder}", content=("model",))',
        )
    assert isinstance(train, dict)
    assert isinstance(optimizer, dict)
    odd = _odd_counters({**train, "optimizer.steps": optimizer.get("steps")})
    odd += [name for name in ("sampler", "data") if name not in state]
    if odd:
        raise CheckpointError(
            f"parts of the stored state cannot be used: {', '.join(odd)}",
            where=checkpoint.folder,
        )
    # An imported checkpoint is step 0, whatever its counters.
    if checkpoint.step not in (train["step"], 0):
        raise CheckpointError(
            f"a checkpoint of step {checkpoint.step} with the counters of step {train['step']}",
            where=checkpoint.folder,
        )


def _odd_counters(counters: dict[str, Any]) -> list[str]:
    """Return the names of counters that are absent or are no counts."""
    names = [field.name for field in fields(TrainState) if field.name != "run_folder"]
    odd = [
        name
        for name in (*names, "optimizer.steps")
        if not _is_count(counters.get(name))
    ]
    if not isinstance(counters.get("run_folder"), str):
        odd.append("run_folder")
    return odd


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
