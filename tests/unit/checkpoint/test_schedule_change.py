"""Which resumes change the learning rate of the next update, and which only what comes later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.native.load import resolve
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.schedule_change import check_schedule
from evomesh.checkpoint.start_point import EVERYTHING, StartPoint
from evomesh.config.record import config_to_dict
from evomesh.config.schema import (
    AdamConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LrConfig,
)
from evomesh.errors import UserError

COSINE: dict[str, Any] = {"type": "cosine"}
WSD: dict[str, Any] = {"type": "wsd", "warmup_steps": 5, "decay_steps": 20}


def config(total: int, accept: bool = False, lr: float = 1e-3, **keys: Any) -> Config:
    return Config(
        data=DataConfig(total_steps=total),
        adam=AdamConfig(lr=lr),
        lr_scheduler=LrConfig.model_validate(keys),
        ckpt=CheckpointConfig(accept_schedule_change=accept),
    )


def resumed(root: Path, updates: int, written_with: Config) -> StartPoint:
    """Return the start of a run that resumes after ``updates`` updates."""
    writer = CheckpointWriter(str(root))
    state = {"train": {"step_count": updates}}
    folder = writer.save(
        updates, {"w": torch.zeros(2)}, state, config_to_dict(written_with)
    )
    assert folder is not None
    checkpoint = resolve(folder)
    return StartPoint("resuming", checkpoint, content=EVERYTHING)


@pytest.mark.parametrize(
    ("updates", "before", "now"),
    [
        (50, config(100, **COSINE), config(101, **COSINE)),
        (50, config(100, type="linear"), config(200, type="linear")),
        (100, config(100, **COSINE), config(200, **COSINE)),
        # In the warm-up, whose length is a ratio; or in the decay.
        (5, config(100, type="constant", warmup_ratio=0.1), config(200, type="constant", warmup_ratio=0.1)),
        (85, config(100, **WSD), config(200, **WSD)),
        (100, config(100, **WSD), config(200, **WSD)),
        (50, config(100, **WSD), config(100, **COSINE)),
    ],
)  # fmt: skip
def test_a_jump_is_refused_unless_it_is_accepted(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    updates: int,
    before: Config,
    now: Config,
) -> None:
    start = resumed(tmp_path, updates, before)
    words = f"learning rate jumps at step {updates}"
    with pytest.raises(UserError, match=words) as caught:
        check_schedule(start, now, log=True)
    assert "--accept-schedule-change" in caught.value.fix
    accepted = now.model_copy(
        update={"ckpt": CheckpointConfig(accept_schedule_change=True)}
    )
    check_schedule(start, accepted, log=True)
    assert f"changes from step {updates} on" in caplog.text


@pytest.mark.parametrize(
    ("updates", "before", "now"),
    [
        (50, config(100, **COSINE), config(100, **COSINE)),
        # Stopped early, and the peak changed on purpose.
        (50, config(60, total_steps=100), config(100, total_steps=100)),
        (50, config(100, **COSINE), config(100, lr=5e-4, **COSINE)),
        (50, config(100, type="constant"), config(900, type="constant")),
        (100, config(100, type="constant", warmup_ratio=0.1), config(900, type="constant", warmup_ratio=0.1)),
        (79, config(100, **WSD), config(900, **WSD)),
        (50, config(100, **WSD), config(70, **WSD)),
        (50, config(100, **COSINE), config(60, total_steps=100, decay_from=50, decay_steps=10)),
        (0, config(100, **COSINE), config(200, **COSINE)),
        (3, config(100, warmup_steps=9), config(200, warmup_steps=9)),
    ],
)  # fmt: skip
def test_a_curve_that_goes_on_is_no_reason_to_refuse(
    tmp_path: Path, updates: int, before: Config, now: Config
) -> None:
    check_schedule(resumed(tmp_path, updates, before), now, log=True)


def test_the_rates_before_and_after_are_shown(tmp_path: Path) -> None:
    start = resumed(tmp_path, 50, config(100, type="linear"))
    with pytest.raises(UserError) as caught:
        check_schedule(start, config(200, type="linear"), log=True)
    rows = [line.split() for line in str(caught.value).splitlines()]
    assert ["50", "0.0005", "0.00075"] in rows and ["150", "-", "0.00025"] in rows
    assert "data.total_steps 100 -> 200" in str(caught.value)
    assert "lr_scheduler.total_steps=100" in caught.value.fix


def test_a_decay_from_an_earlier_step_is_refused_even_if_accepted(
    tmp_path: Path,
) -> None:
    start = resumed(tmp_path, 50, config(100, **WSD))
    late = config(45, True, total_steps=100, type="wsd", decay_from=40, decay_steps=5)
    with pytest.raises(UserError, match="has made 50 updates") as caught:
        check_schedule(start, late, log=True)
    assert "lr_scheduler.decay_from=50" in caught.value.fix


def test_a_run_that_starts_from_weights_has_no_schedule_to_keep(tmp_path: Path) -> None:
    start = resumed(tmp_path, 50, config(100, **COSINE))
    for content in ({"model"}, {"model", "optimizer"}):
        weights = replace(start, content=frozenset(content))
        check_schedule(weights, config(200, **COSINE), log=True)
    check_schedule(StartPoint("scratch"), config(200, **COSINE), log=True)
