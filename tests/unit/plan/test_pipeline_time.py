"""Time of a pipeline against the formulas of its schedules."""

from __future__ import annotations

import pytest

from evomesh.pipeline.action_order import ScheduleAction, one_forward_one_backward
from evomesh.plan.pipeline_time import StageSeconds, pipeline_seconds

F, B = 1.0, 2.0


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("count", [4, 8, 13])
def test_1f1b_has_a_bubble_of_one_forward_and_backward_per_other_stage(
    stages: int, count: int
) -> None:
    order = one_forward_one_backward(stages, count)
    found = pipeline_seconds(order, [StageSeconds(F, B)] * stages, hop=0.0)
    assert found == pytest.approx((count + stages - 1) * (F + B))


def test_each_action_is_done_once_and_few_micro_batches_wait() -> None:
    order = one_forward_one_backward(4, 9)
    for rank, actions in order.items():
        expected = {
            ScheduleAction(rank, kind, index) for kind in "FB" for index in range(9)
        }
        assert set(actions) == expected
        assert len(actions) == len(expected)
        in_flight = 0
        most = 0
        for action in actions:
            in_flight += 1 if action.kind == "F" else -1
            most = max(most, in_flight)
        assert most == 4 - rank


def test_the_slowest_stage_sets_the_pace() -> None:
    order = one_forward_one_backward(2, 10)
    stages = [StageSeconds(F, B), StageSeconds(2 * F, 2 * B)]
    found = pipeline_seconds(order, stages, hop=0.0)
    assert found == pytest.approx(F + 10 * 2 * (F + B) + B)


def test_hops_delay_the_first_and_the_last_micro_batch() -> None:
    order = one_forward_one_backward(2, 1)
    stages = [StageSeconds(F, B)] * 2
    without = pipeline_seconds(order, stages, hop=0.0)
    assert pipeline_seconds(order, stages, hop=0.5) == pytest.approx(without + 1.0)


def test_weight_gradients_fill_the_bubble() -> None:
    """Inputs' gradients first: the stage before can begin while weights' are computed."""
    whole = {
        0: [ScheduleAction(0, "F", 0), ScheduleAction(0, "B", 0)],
        1: [ScheduleAction(1, "F", 0), ScheduleAction(1, "B", 0)],
    }
    divided = {
        rank: [
            ScheduleAction(rank, "F", 0),
            ScheduleAction(rank, "I", 0),
            ScheduleAction(rank, "W", 0),
        ]
        for rank in range(2)
    }
    stages = [StageSeconds(F, B)] * 2
    assert pipeline_seconds(whole, stages, 0.0) == pytest.approx(2 * (F + B))
    assert pipeline_seconds(divided, stages, 0.0) == pytest.approx(2 * F + 3 * B / 2)


def test_an_order_in_which_ranks_wait_for_each_other_is_refused() -> None:
    order = {
        0: [ScheduleAction(0, "B", 0), ScheduleAction(0, "F", 0)],
        1: [ScheduleAction(1, "F", 0), ScheduleAction(1, "B", 0)],
    }
    with pytest.raises(ValueError, match="wait for each other"):
        pipeline_seconds(order, [StageSeconds(F, B)] * 2, 0.0)
