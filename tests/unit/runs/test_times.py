"""Where the time of a run went: figures worked out by hand from a history with one restart."""

from __future__ import annotations

from typing import Any

import pytest

from evomesh.runs.read import starts_of
from evomesh.runs.times import account_for
from tests.support.run_folders import history_of_two_starts


def test_every_second_has_one_cause() -> None:
    account = account_for(starts_of(history_of_two_starts()))
    assert account is not None
    assert account.wall == 56  # 100 to 156
    assert account.causes == {
        # steps 0 and 1 of the first start: 4 - 0.5, 5 - 3; steps 2 to 4 of the second: 4, 4 - 1.5, 4
        "useful": pytest.approx(3.5 + 2 + 4 + 2.5 + 4),
        "recomputed": 4 + 4,  # steps 2 and 3, with their validation
        "data wait": 1.5,
        "validation": 1.5,
        "save": 2 + 1.5,
        "start": (103 - 100) + (142 - 140),
        "down": 140 - 120,
        "other": pytest.approx(0.5),  # of the end, beside its save
    }
    assert sum(account.causes.values()) == pytest.approx(account.wall)
    assert account.goodput == pytest.approx(16 / 56)


def test_a_restart_costs_its_gap_its_start_and_the_steps_done_again() -> None:
    account = account_for(starts_of(history_of_two_starts()))
    assert account is not None
    first, second = account.starts
    assert (first.cost, first.recomputed, first.outcome) == (0, 0, "")
    assert (second.down, second.starting) == (20, 2)
    assert (second.recomputed, second.recomputed_seconds) == (2, 8)
    assert second.cost == 20 + 2 + 8
    assert second.outcome == "done"


def test_a_step_that_is_lost_twice_counts_for_the_start_after_each() -> None:
    def start(step: int, time: float) -> dict[str, Any]:
        return {"event": "start", "time": time, "began": time, "step": step}

    rows = [
        start(0, 0), *({"step": s, "time": s + 1.0, "seconds": 1.0} for s in range(3)),
        start(1, 10), *({"step": s, "time": 10.0 + s, "seconds": 1.0} for s in (1, 2)),
        start(0, 20), *({"step": s, "time": 21.0 + s, "seconds": 1.0} for s in range(4)),
    ]  # fmt: skip
    account = account_for(starts_of(rows))
    assert account is not None
    assert [one.recomputed for one in account.starts] == [0, 2, 3]
    assert account.causes["recomputed"] == 5
    assert account.causes["useful"] == 4


def test_a_rollback_begins_where_the_start_before_it_ended() -> None:
    rows: list[dict[str, Any]] = [
        {"event": "start", "time": 103, "began": 100, "step": 0},
        *({"step": s, "time": 105.0 + s, "seconds": 1.0} for s in range(4)),
        {"event": "end", "time": 110, "step": 3, "outcome": "stopped"},
        {"event": "start", "time": 112, "began": 100, "step": 2},
        *({"step": s, "time": 112.0 + s, "seconds": 1.0} for s in range(2, 6)),
        {"event": "end", "time": 118, "step": 6, "outcome": "done"},
    ]
    account = account_for(starts_of(rows))
    assert account is not None
    before, after = account.starts
    assert (before.outcome, before.is_rollback) == ("rolled back", False)
    assert (after.outcome, after.is_rollback) == ("done", True)
    assert (after.began, after.down, after.starting) == (110, 0, 3)
    assert after.cost == 3 + 2  # steps 2 and 3
    assert sum(account.causes.values()) == account.wall == 18


def test_no_history_has_no_account() -> None:
    assert account_for([]) is None


def test_figures_of_the_wrong_kind_count_as_nothing() -> None:
    rows: list[dict[str, Any]] = [
        {"event": "start", "time": "x", "began": 5.0, "step": "y", "world_size": None},
        {"step": 0, "time": None, "seconds": "z", "phases": ["a"]},
    ]
    account = account_for(starts_of(rows))
    assert account is not None
    assert account.causes["useful"] == 0
