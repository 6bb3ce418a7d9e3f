from __future__ import annotations

import gc
import weakref

import pytest

from evomesh.train.upkeep import PeriodicUpkeep, garbage_at_fixed_steps
from tests.support.covers import covers


@pytest.fixture(scope="module", autouse=True)
def what_other_tests_left_is_exempt() -> None:
    """Spare each search a million objects of modules that tests have imported."""
    gc.collect()
    gc.freeze()


class Rounds:
    """A diagnosis that notes the mean time of each round."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def run(self, fwd_bwd: float) -> None:
        self.means.append(fwd_bwd)


@covers("data.empty_cache_and_diag_interval")
@pytest.mark.parametrize(("interval", "every"), [(4, 4), (0, 50), (-1, 50)])
def test_a_round_of_diagnosis_has_the_mean_of_its_interval(
    interval: int, every: int
) -> None:
    rounds = Rounds()
    keeping = PeriodicUpkeep(interval, rounds)
    for step in range(1, 2 * every + 1):
        keeping.after_step(2.0 if step % every else 4.0)
        assert len(rounds.means) == step // every
    mean = (2.0 * (every - 1) + 4.0) / every
    assert rounds.means == pytest.approx([mean, mean])


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_cycles_of_a_step_are_freed_after_it_and_old_ones_every_interval() -> None:
    keeping = PeriodicUpkeep(3, Rounds())
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
    if is_enabled:
        gc.enable()
    else:
        gc.disable()
    try:
        with garbage_at_fixed_steps():
            gc.callbacks.append(note)
            kept = [[] for _ in range(50 * gc.get_threshold()[0])]
            assert searches == []
            gc.callbacks.remove(note)
        assert gc.isenabled() == is_enabled
        assert len(kept) > 0
    finally:
        if was_enabled:
            gc.enable()


@pytest.mark.parametrize("is_frozen", [True, False])
def test_what_exists_is_exempt_while_a_run_lasts(is_frozen: bool) -> None:
    """What the program had exempted itself stays exempt after the run."""
    frozen_before = gc.get_freeze_count()
    gc.unfreeze()
    if is_frozen:
        gc.freeze()
    try:
        with garbage_at_fixed_steps():
            assert gc.get_freeze_count() > 0
        assert (gc.get_freeze_count() > 0) == is_frozen
    finally:
        if frozen_before:
            gc.freeze()
