from __future__ import annotations

import pytest
import torch

from evomesh.config.schema import AdamConfig, Beta2Config, LrConfig
from evomesh.optim.schedule import beta2, learning_rate
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
