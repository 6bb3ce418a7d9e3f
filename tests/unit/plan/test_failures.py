"""Failures and stragglers against what drawing them at random gives."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evomesh.errors import UserError
from evomesh.plan.failures import FailureModel, seconds_between_failures
from evomesh.plan.stragglers import KINDS, StepJitter


def drawn_lost_share(model: FailureModel, interval: float, seed: int) -> float:
    """Draw failures for many intervals: an interval or a restart that a failure hits begins anew with a restart."""
    random = np.random.default_rng(seed)
    segments = 40_000
    wall = 0.0
    needed = interval + model.stall
    for _ in range(segments):
        until = random.exponential(model.between)
        while until < needed:
            wall += until
            until = random.exponential(model.between)
            while until < model.restart:
                wall += until
                until = random.exponential(model.between)
            wall += model.restart
            until = random.exponential(model.between)
        wall += needed
    return 1 - segments * interval / wall


@pytest.mark.parametrize("interval", [300.0, 3000.0])
def test_lost_time_is_that_of_drawn_failures(interval: float) -> None:
    model = FailureModel(between=4000.0, stall=60.0, restart=600.0)
    drawn = drawn_lost_share(model, interval, seed=1)
    assert model.lost_share(interval) == pytest.approx(drawn, abs=0.01)


@pytest.mark.parametrize("stall", [1.0, 30.0, 600.0])
def test_the_interval_of_daly_loses_least(stall: float) -> None:
    model = FailureModel(between=10_000.0, stall=stall, restart=300.0)
    tried = np.geomspace(model.daly / 20, model.daly * 20, 4000)
    best = min(tried, key=model.lost_share)
    assert model.daly == pytest.approx(best, rel=0.02)
    # Young's is near where a checkpoint is cheap.
    if stall == 1:
        assert model.young == pytest.approx(best, rel=0.02)


def test_checkpoints_that_take_longer_than_failures_allow() -> None:
    model = FailureModel(between=100.0, stall=1000.0, restart=60.0)
    assert model.daly == 100.0
    assert model.lost_share(1e9) == 1.0


def test_a_run_of_many_devices_fails_as_often_as_all_of_them() -> None:
    assert seconds_between_failures(50_000, 16_384) == pytest.approx(10_986, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [8, 512])
def test_the_slowest_rank_is_that_of_drawn_steps(kind: str, ranks: int) -> None:
    jitter = StepJitter.parse(f"{kind}:0.05")
    random = np.random.default_rng(2)
    shape = (4000, ranks)
    if kind == "exponential":
        times = 1 + random.exponential(0.05, shape)
    else:
        times = 1 + random.normal(0, 0.05, shape)
        if kind == "lognormal":
            times = np.exp(times - 1)
    drawn = times.max(axis=1).mean() / times.mean()
    assert jitter.slowest_of(ranks) == pytest.approx(drawn, rel=2e-3)


def test_one_rank_and_no_spread_cost_nothing() -> None:
    assert StepJitter.parse("normal:0.1").slowest_of(1) == pytest.approx(1)
    assert StepJitter.parse("lognormal:0").slowest_of(16_384) == 1
    # As known: the harmonic number grows as the logarithm.
    many = StepJitter.parse("exponential:1").slowest_of(16_384)
    assert many == pytest.approx((1 + math.log(16_384) + 0.57722) / 2, rel=1e-4)


@pytest.mark.parametrize("text", ["normal", "normal:x", "normal:2", "uniform:0.1", ""])
def test_other_distributions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="no distribution"):
        StepJitter.parse(text)
