"""Order of packs compared with InternEvo's per-rank procedure, and its independence of the layout."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomesh.config.step_values import BatchSizeRampup
from evomesh.data.packing.packs import PackOrder
from evomesh.data.packing.sampler import PackSampler, SamplerPosition
from evomesh.errors import UserError
from tests.support.covers import covers


def internevo_order(
    num_packs: int, seed: int, micro_num: int, dp: int, steps: int
) -> list[list[list[int]]]:
    """Return the packs that InternEvo's sampler yields, by step and rank.

    In each pass a rank takes a strided share of one permutation, ``micro_num`` packs at a time.
    """
    generators = [np.random.RandomState(seed) for _ in range(dp)]
    streams: list[list[list[int]]] = [[] for _ in range(dp)]
    while len(streams[0]) < steps:
        for rank in range(dp):
            indices = np.arange(num_packs)
            generators[rank].shuffle(indices)
            indices = indices[: num_packs // (micro_num * dp) * (micro_num * dp)]
            own = indices[rank::dp].tolist()
            streams[rank] += [
                own[i : i + micro_num] for i in range(0, len(own), micro_num)
            ]
    return [[streams[rank][step] for rank in range(dp)] for step in range(steps)]


def our_order(
    sampler: PackSampler, dp: int, steps: int, start: SamplerPosition | None = None
) -> list[list[list[int]]]:
    position, found = start or SamplerPosition(), []
    for _ in range(steps):
        packs, position = sampler.take(position)
        found.append([packs[rank::dp].tolist() for rank in range(dp)])
    return found


layouts = st.tuples(st.integers(1, 4), st.integers(1, 4))


@covers("data.seed")
@given(st.integers(0, 60), layouts, st.integers(0, 2**32 - 1), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_the_order_of_packs_is_internevos(
    surplus: int, layout: tuple[int, int], seed: int, steps: int
) -> None:
    micro_num, dp = layout
    num_packs = micro_num * dp + surplus
    sampler = PackSampler(num_packs, seed, micro_num * dp)
    assert our_order(sampler, dp, steps) == internevo_order(
        num_packs, seed, micro_num, dp, steps
    )


@given(st.integers(24, 90), st.integers(0, 25), st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 6, 12]),
       st.sampled_from(["internevo", "xtuner"]), st.booleans())  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_another_layout_of_the_same_global_batch_resumes_with_the_same_packs(
    num_packs: int, stop: int, dp_before: int, dp_after: int, order: Any, ramp: bool
) -> None:
    def build(dp: int) -> PackSampler:
        rampup = BatchSizeRampup(1, 1, 3).times(dp) if ramp else None
        return PackSampler(
            num_packs, 7, 12, rampup, order, dp if order == "xtuner" else 1
        )

    straight = build(dp_before)
    position = SamplerPosition()
    sets = []
    for _ in range(stop + 10):
        packs, position = straight.take(position)
        sets.append(packs.tolist())
    before = build(dp_before)
    state = json.loads(json.dumps(before.state(before.seek(stop))))
    after = build(dp_after)
    position = after.resume(state)
    for step in range(stop, stop + 10):
        packs, position = after.take(position)
        assert packs.tolist() == sets[step]


@given(
    st.integers(12, 90),
    st.integers(0, 60),
    st.booleans(),
    st.sampled_from(["internevo", "xtuner"]),
)
@settings(max_examples=100, deadline=None)
def test_seek_finds_the_position_of_an_uninterrupted_run(
    num_packs: int, step: int, ramp: bool, order: Any
) -> None:
    rampup = BatchSizeRampup(2, 2, 3) if ramp else None
    unit = 2 if order == "xtuner" else 1
    straight = PackSampler(num_packs, 3, 8, rampup, order, unit)
    position = SamplerPosition()
    for _ in range(step):
        _, position = straight.take(position)
    expected, _ = straight.take(position)
    seeking = PackSampler(num_packs, 3, 8, rampup, order, unit)
    packs, _ = seeking.take(seeking.seek(step))
    assert packs.tolist() == expected.tolist()


def test_a_pass_has_each_pack_once_and_the_next_another_order() -> None:
    sampler = PackSampler(20, 1024, 5)
    steps = our_order(sampler, 1, 8)
    first, second = (
        [pack for step in half for pack in step[0]] for half in (steps[:4], steps[4:])
    )
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_xtuner_shuffles_pass_e_with_seed_plus_e() -> None:
    sampler = PackSampler(10, 1024, 4, order="xtuner", unit=1)
    got = [pack for step in our_order(sampler, 1, 5) for pack in step[0]]
    expected = []
    for epoch in range(2):
        indices = np.arange(10)
        np.random.RandomState(1024 + epoch).shuffle(indices)
        expected += indices.tolist()
    assert got == expected


@covers("promise:rampup")
def test_rampup_grows_the_global_batch() -> None:
    ramp = BatchSizeRampup(1, 1, 5).times(2)
    assert [ramp.size(step, 8) for step in (0, 4, 5, 10, 15, 99)] == [2, 2, 4, 6, 8, 8]


def test_state_of_other_data_is_refused() -> None:
    state = PackSampler(20, 1, 4).state(SamplerPosition())
    with pytest.raises(UserError, match="num_packs 20, this run has 21"):
        PackSampler(21, 1, 4).resume(state)


@pytest.mark.parametrize("order", ["internevo", "xtuner"])
def test_the_largest_seed_reaches_later_passes(order: PackOrder) -> None:
    sampler = PackSampler(20, 2**32 - 1, 5, order=order)
    first, second = (sampler.permutation(epoch).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
