from __future__ import annotations

import math

import pytest

from evomesh.monitor.alerts.spike import LossSpike
from tests.support.covers import covers

FALLING = [10 * math.exp(-step / 30) + 2 for step in range(200)]


def spikes(losses: list[float], ratio: float = 1.5) -> list[int]:
    spike = LossSpike(ratio)
    found = []
    for step, loss in enumerate(losses):
        if spike.exceeded_mean(loss) is not None:
            found.append(step)
    return found


@covers("monitor.alert.loss_spike_ratio")
@pytest.mark.parametrize(("ratio", "found"), [(1.5, [100]), (3.0, [])])
def test_a_loss_above_the_ratio_times_the_mean_is_a_spike(
    ratio: float, found: list[int]
) -> None:
    losses = [*FALLING[:100], 2 * FALLING[100], *FALLING[101:]]
    assert spikes(losses, ratio) == found
    assert spikes(FALLING, ratio) == []


def test_the_mean_is_that_of_the_losses_before() -> None:
    spike = LossSpike(1.5)
    for loss in (2.0, 4.0, 6.0):
        assert spike.exceeded_mean(loss) is None
    assert spike.exceeded_mean(6.1) == pytest.approx(4.0)


def test_a_huge_loss_does_not_hide_the_next_one() -> None:
    assert spikes([2.0] * 10 + [1e9, 2.0, 5.0, 2.0]) == [10, 12]


def test_a_loss_that_stays_becomes_the_mean() -> None:
    found = spikes([2.0] * 20 + [4.0] * 40)
    assert found[0] == 20
    assert len(found) < 10


@pytest.mark.parametrize("strange", [math.nan, math.inf, -1.0, 0.0])
def test_what_is_not_a_loss_changes_nothing(strange: float) -> None:
    assert spikes([2.0, strange, 2.0, strange, 2.0, 2.1, 9.0]) == [6]
