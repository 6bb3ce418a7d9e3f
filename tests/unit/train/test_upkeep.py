from __future__ import annotations

import gc
import logging
import weakref

import pytest

from evomesh.parallel.grid import Axis
from evomesh.train import upkeep
from evomesh.train.upkeep import (
    PeriodicUpkeep,
    garbage_at_fixed_steps,
    slow_ranks,
)
from tests.support.covers import covers


@covers("data.diag_outlier_ratio")
def test_slow_is_above_the_ratio_times_the_median() -> None:
    assert slow_ranks([1.0, 1.0, 1.2, 1.0], 1.1) == [(2, 1.2)]
    assert slow_ranks([1.0, 1.0, 1.2, 1.0], 1.25) == []
    assert slow_ranks([3.0], 1.0) == []


@pytest.mark.slow
@covers("data.empty_cache_and_diag_interval")
@pytest.mark.parametrize(("interval", "every"), [(4, 4), (0, 50), (-1, 50)])
def test_slow_ranks_are_named_every_interval(
    interval: int,
    every: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # One peer takes 9 s.
    monkeypatch.setattr(
        upkeep, "all_gather_objects", lambda value, axis: [value, 9.0, value]
    )
    keeping = PeriodicUpkeep(interval, 1.5, Axis("dp", 3, 0))
    with caplog.at_level(logging.WARNING):
        for step in range(1, 2 * every + 1):
            keeping.after_step(2.0 if step % every else 4.0)
            assert len(caplog.records) == step // every
    mean = (2.0 * (every - 1) + 4.0) / every
    assert caplog.messages[0] == (
        f"data-parallel rank 1 is slow: forward and backward took 9.000 s (median of 3 ranks: {mean:.3f} s)"
    )


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_cycles_of_a_step_are_freed_after_it_and_old_ones_every_interval() -> None:
    keeping = PeriodicUpkeep(3, 1.1, Axis("dp"))
    with garbage_at_fixed_steps():
        old_cycle = Cycle()
        gc.collect()  # into the oldest generation
        old, new = weakref.ref(old_cycle), weakref.ref(Cycle())
        del old_cycle
        assert new() is not None
        for _ in range(2):
            keeping.after_step(1.0)
            assert new() is None
            assert old() is not None
        keeping.after_step(1.0)
        assert old() is None


@pytest.mark.parametrize("is_enabled", [True, False])
def test_garbage_is_searched_for_at_no_other_time(is_enabled: bool) -> None:
    """By the collector's own callbacks, while a program makes more objects than start a search."""
    searches: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        searches.append(phase)

    was_enabled = gc.isenabled()
    if not is_enabled:
        gc.disable()
    try:
        with garbage_at_fixed_steps():
            gc.callbacks.append(note)
            kept = [[] for _ in range(50 * gc.get_threshold()[0])]
            assert searches == []
            assert gc.get_freeze_count() > 0
            gc.callbacks.remove(note)
        assert gc.isenabled() == is_enabled
        assert gc.get_freeze_count() == 0
        assert len(kept) > 0
    finally:
        if was_enabled:
            gc.enable()
