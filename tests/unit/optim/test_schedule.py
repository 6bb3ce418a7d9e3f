from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import transformers

from evomesh.config.lr_scheduler import DecayType, ScheduleType
from evomesh.config.schema import AdamConfig, Beta2Config, LrConfig
from evomesh.optim.schedule import (
    DECAYS,
    SHAPES,
    beta2,
    learning_rate,
    preview_steps,
)
from tests.support.covers import covers

PAPER = (LrConfig(warmup_ratio=0.01, eta_min=1e-5), AdamConfig(lr=1e-4), 50000)


@covers("promise:lr-schedule")
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2e-7),
        (1, 4e-7),
        (499, 1e-4),
        (500, 1e-4),
        (25250, 5.5e-5),
        (50000, 1e-5),
        (60000, 1e-5),
    ],
)
def test_documented_table(step: int, expected: float) -> None:
    assert learning_rate(step, *PAPER) == pytest.approx(expected, rel=1e-12)


@covers("lr_scheduler.total_steps", "lr_scheduler.eta_min")
def test_cosine_is_torchs() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 49500, eta_min=1e-5)
    for step in range(500, 1500):
        assert learning_rate(step, *PAPER) == pytest.approx(
            cosine.get_last_lr()[0], rel=1e-9
        )
        sgd.step()
        cosine.step()


def test_a_rate_at_the_end_above_the_peak_is_risen_to() -> None:
    """Two of InternEvo's configs have one; half way its formula gives the mean."""
    config = LrConfig(eta_min=1e-5)
    ends = [
        learning_rate(step, config, AdamConfig(lr=2e-6), 50) for step in (0, 25, 50)
    ]
    assert ends == pytest.approx([2e-6, 6e-6, 1e-5], rel=1e-12)


@covers("lr_scheduler.init_steps", "lr_scheduler.warmup_ratio")
def test_init_steps_come_before_the_warm_up() -> None:
    config = LrConfig(init_steps=3, warmup_ratio=0.2, total_steps=20)
    rates = [learning_rate(step, config, AdamConfig(lr=1.0), 999) for step in range(9)]
    assert rates[:7] == [0, 0, 0, 0.25, 0.5, 0.75, 1.0]
    assert rates[7] == 1.0 > rates[8]


@covers("lr_scheduler.warmup_start")
@pytest.mark.parametrize(("warmup", "start"), [(20, 1 / 40), (7, 0.5), (2, 0.01)])
def test_a_warm_up_from_a_fraction_is_torchs(warmup: int, start: float) -> None:
    """XTuner's schedule of one micro-iteration per step: LinearLR, then CosineAnnealingLR, as torch has them."""
    parameter = torch.zeros(1, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=4e-5)
    linear = torch.optim.lr_scheduler.LinearLR(sgd, start, total_iters=warmup - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 100 - warmup, eta_min=6e-6)
    both = torch.optim.lr_scheduler.SequentialLR(
        sgd, [linear, cosine], milestones=[warmup]
    )
    config = LrConfig(warmup_ratio=warmup / 100, warmup_start=start, eta_min=6e-6)
    for step in range(100):
        assert learning_rate(step, config, AdamConfig(lr=4e-5), 100) == pytest.approx(
            both.get_last_lr()[0]
        )
        sgd.step()
        both.step()


def test_a_warm_up_as_long_as_the_run_does_not_divide_by_zero() -> None:
    assert (
        learning_rate(
            10, LrConfig(warmup_ratio=1.0, eta_min=0.1), AdamConfig(lr=1.0), 10
        )
        == 0.1
    )


@covers("adam.adam_beta2_c", "beta2_scheduler.init_beta2", "beta2_scheduler.c")
def test_beta2() -> None:
    adam = AdamConfig(adam_beta2=0.95)
    assert [beta2(step, Beta2Config(), adam) for step in (0, 1000)] == [0.95, 0.95]
    growing = Beta2Config(init_beta2=0.9, c=0.8)
    assert beta2(0, growing, adam) == 0.9
    assert beta2(99, growing, adam) == pytest.approx(1 - 100**-0.8)
    assert beta2(
        99, Beta2Config(), AdamConfig(adam_beta2=0.9, adam_beta2_c=0.8)
    ) == beta2(99, growing, adam)


def rates(steps: int, length: int, **keys: Any) -> list[float]:
    """Return our rates of ``steps`` updates with the peak 1e-3."""
    config = LrConfig.model_validate(keys)
    adam = AdamConfig(lr=1e-3)
    return [learning_rate(step, config, adam, length) for step in range(steps)]


def rates_of(make: Callable[[Any], Any], steps: int) -> list[float]:
    """Return the rates of a scheduler of torch or transformers, with the peak 1e-3."""
    parameter = torch.zeros(1, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=1e-3)
    scheduler = make(sgd)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        sgd.step()
        scheduler.step()
    return found


def test_every_name_of_a_type_has_its_function() -> None:
    assert set(SHAPES) == set(get_args(ScheduleType))
    assert set(DECAYS) == set(get_args(DecayType))


@covers(
    "lr_scheduler.type",
    "lr_scheduler.decay_type",
    "lr_scheduler.decay_steps",
    "lr_scheduler.warmup_steps",
)
@pytest.mark.parametrize("decay_type", get_args(DecayType))
def test_wsd_is_transformers(decay_type: str) -> None:
    """After the warm-up, whose first rate is 0 there and that of one step here."""
    theirs = rates_of(
        lambda sgd: transformers.get_wsd_schedule(
            sgd,
            num_warmup_steps=10,
            num_stable_steps=60,
            num_decay_steps=30,
            decay_type=decay_type,
            min_lr_ratio=0.1,
        ),
        110,
    )
    ours = rates(
        110,
        100,
        type="wsd",
        warmup_steps=10,
        decay_steps=30,
        decay_type=decay_type,
        eta_min=1e-4,
    )
    assert ours[10:] == pytest.approx(theirs[10:], rel=1e-12)
    assert ours[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])


def test_linear_is_torchs() -> None:
    theirs = rates_of(
        lambda sgd: torch.optim.lr_scheduler.LinearLR(sgd, 1.0, 0.2, total_iters=80), 90
    )
    ours = rates(110, 100, type="linear", warmup_ratio=0.2, eta_min=2e-4)
    assert ours[20:] == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 16])
def test_inverse_sqrt_is_transformers(warmup: int) -> None:
    theirs = rates_of(
        lambda sgd: transformers.get_inverse_sqrt_schedule(sgd, warmup), 90
    )
    ours = rates(90, 90, type="inverse_sqrt", warmup_steps=warmup)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)


@covers("lr_scheduler.power", "lr_scheduler.timescale")
def test_power_falls_by_its_exponent() -> None:
    ours = rates(301, 400, type="power", power=0.75, timescale=20, eta_min=2e-4)
    # 80 steps of a scale of 20 are a factor of 5; then the floor.
    assert ours[80] == pytest.approx(1e-3 / 5**0.75, rel=1e-12)
    assert ours[300] == 2e-4 > 1e-3 / 16**0.75


def test_constant_stays() -> None:
    ours = rates(300, 100, type="constant", warmup_steps=4, eta_min=1e-5)
    assert ours[3:] == [1e-3] * 297


@covers("lr_scheduler.decay_ratio")
def test_a_power_law_decays_from_where_it_is() -> None:
    ours = rates(100, 100, type="power", decay_ratio=0.25, timescale=10, power=0.5)
    for step in range(100):
        law = 1e-3 / math.sqrt(1 + min(step, 75) / 10)
        share = (100 - step) / 25 if step > 75 else 1
        assert ours[step] == pytest.approx(law * share, rel=1e-12)


def test_wsd_decays_over_a_tenth_by_default() -> None:
    ours = rates(100, 100, type="wsd")
    assert ours[90] == 1e-3 > ours[91] == pytest.approx(9e-4)


@covers("lr_scheduler.decay_from")
@pytest.mark.parametrize("kind", get_args(ScheduleType))
def test_decay_from_a_step_leaves_what_came_before(kind: str) -> None:
    before = rates(100, 100, type=kind, warmup_steps=5)
    after = rates(80, 70, type=kind, warmup_steps=5, total_steps=100, decay_from=50, decay_steps=20)  # fmt: skip
    assert after[:51] == before[:51]
    expected = [before[50] * (70 - step) / 20 for step in range(50, 70)]
    assert after[50:70] == pytest.approx(expected, rel=1e-12)
    assert after[70:] == [0.0] * 10


def test_a_preview_has_the_borders() -> None:
    config = LrConfig(type="wsd", warmup_steps=10, decay_steps=20)
    steps = preview_steps(config, 0, 100)
    assert {0, 10, 80, 99} <= set(steps)
    assert preview_steps(config, 85, 100) == [85, 90, 95, 99]
