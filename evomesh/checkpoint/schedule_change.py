"""The check that a run resumes with the learning rate it had, or that a jump was asked for."""

from __future__ import annotations

import logging

from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.start_point import StartPoint
from evomesh.config.record import config_from_dict
from evomesh.config.schema import AdamConfig, Config
from evomesh.errors import UserError
from evomesh.optim.schedule import learning_rate, preview_steps

logger = logging.getLogger(__name__)
SAME = 1e-12  # relative
KEYS = (
    "type",
    "total_steps",
    "init_steps",
    "warmup_ratio",
    "warmup_steps",
    "warmup_start",
    "eta_min",
    "decay_type",
    "decay_steps",
    "decay_ratio",
    "decay_from",
    "power",
    "timescale",
)


def check_schedule(start: StartPoint, config: Config, log: bool) -> None:
    """Refuse to continue a run with another learning rate than the one that it has, unless that is accepted.

    A schedule that differs only later, such as ``wsd`` with a later end, continues the
    same curve and is no reason to refuse.
    ``adam.lr`` is not compared, because nobody changes it by accident.

    Args:
        log: this rank writes the log of all.

    Raises:
        CheckpointError: the rate of the next update is another; with the rates of a few steps before and after.
    """
    checkpoint = start.checkpoint
    if checkpoint is None or not start.resumes:
        return
    _check_branch(start, checkpoint, config)
    try:
        before = config_from_dict(checkpoint.config)
    except UserError:
        # Of another version: its schedule cannot be computed.
        return
    updates = int(checkpoint.state.get("train", {}).get("step_count", checkpoint.step))
    _check_decay_start(checkpoint, updates, before, config)
    bends = not _are_same(
        _rate(updates, before, config.adam), _rate(updates, config, config.adam)
    )
    table = _table(updates, before, config)
    if bends and not config.ckpt.accept_schedule_change:
        raise CheckpointError(
            f"with this config the learning rate jumps at step {updates}, where the run resumes: "
            f"{_named_changes(before, config)}\n{table}",
            where=checkpoint.folder,
            expected="the schedule of the run that wrote the checkpoint",
            fix=f"{_kept_length(before, config)}take the new curve: --accept-schedule-change "
            "(ckpt.accept_schedule_change=True); or decay from here: "
            f"lr_scheduler.decay_from={updates} and lr_scheduler.decay_steps",
            code="EVO-CKPT-010",
        )
    if log and table and (bends or config.lr_scheduler.decay_from is not None):
        logger.warning("the learning rate changes from step %d on:\n%s", updates, table)


def _check_branch(start: StartPoint, checkpoint: Checkpoint, config: Config) -> None:
    """Refuse a branch from another step than the path says, since the decay begins at that of the path."""
    step = config.lr_scheduler.decay_start
    if start.is_branch and checkpoint.step != step:
        raise CheckpointError(
            f"this checkpoint is step {checkpoint.step}, not step {step}",
            where=f"lr_scheduler.decay_from ({config.lr_scheduler.branch})",
            expected="a path that ends in the step of the checkpoint",
            fix=f"lr_scheduler.decay_from={checkpoint.folder!r}",
            code="EVO-CKPT-010",
        )


def _check_decay_start(
    checkpoint: Checkpoint, updates: int, before: Config, config: Config
) -> None:
    """Refuse a new decay from a step that is over."""
    decay_start = config.lr_scheduler.decay_start
    is_new_decay = before.lr_scheduler.decay_start != decay_start
    if decay_start is not None and is_new_decay and decay_start < updates:
        raise CheckpointError(
            f"lr_scheduler.decay_from is {decay_start}, and this checkpoint has made {updates} updates",
            where=checkpoint.folder,
            expected="a decay that has not begun yet",
            fix=f"lr_scheduler.decay_from={updates}, or branch from an earlier checkpoint: "
            'lr_scheduler.decay_from="FOLDER/STEP" and a new ckpt.save_ckpt_folder',
            code="EVO-CKPT-010",
        )


def _rate(step: int, config: Config, adam: AdamConfig) -> float:
    return learning_rate(step, config.lr_scheduler, adam, config.data.total_steps)


def _are_same(a: float, b: float) -> bool:
    return abs(a - b) <= SAME * max(abs(a), abs(b))


def _table(
    updates: int,
    before: Config,
    now: Config,
) -> str:
    """Return the rates of a few steps from ``updates`` on, in both schedules; "" if they are the same."""
    end = max(before.data.total_steps, now.data.total_steps)
    steps: set[int] = set()
    for config in (before, now):
        preview = preview_steps(config.lr_scheduler, updates, end)
        steps.update(preview)
    has_changed = False
    lines = [_line("step", "lr before", "lr now")]
    for step in sorted(steps):
        old_rate = _cell(step, before, now.adam)
        new_rate = _cell(step, now, now.adam)
        has_changed = has_changed or old_rate != new_rate
        line = _line(str(step), old_rate, new_rate)
        lines.append(line)
    return "\n".join(lines) if has_changed else ""


def _line(step: str, before: str, now: str) -> str:
    return f"  {step:>9}  {before:>12}  {now:>12}"


def _cell(step: int, config: Config, adam: AdamConfig) -> str:
    """Return the rate of a step as text, "-" after the end of the run."""
    has_ended = step >= config.data.total_steps
    return "-" if has_ended else f"{_rate(step, config, adam):.6g}"


def _named_changes(before: Config, now: Config) -> str:
    """Return the keys of the schedule that differ, with both values."""
    changes = []
    if before.data.total_steps != now.data.total_steps:
        lengths = f"{before.data.total_steps} -> {now.data.total_steps}"
        changes.append(f"data.total_steps {lengths}")
    for key in KEYS:
        old = getattr(before.lr_scheduler, key)
        new = getattr(now.lr_scheduler, key)
        if old != new:
            changes.append(f"lr_scheduler.{key} {old} -> {new}")
    return ", ".join(changes)


def _kept_length(before: Config, now: Config) -> str:
    """Return how to keep the old curve if its length has changed."""
    old = before.lr_scheduler.length(before.data.total_steps)
    new = now.lr_scheduler.length(now.data.total_steps)
    if old == new:
        return ""
    return f"keep the curve: lr_scheduler.total_steps={old}; or "
