"""Weighted sources: the share of each on every prefix, its passes, and resume."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomesh.config.data import DataConfig
from evomesh.config.step_values import BatchSizeRampup
from evomesh.data.build import build_train_data
from evomesh.data.packing.mixture import MixedSampler, MixtureSchedule, WeightedSource
from evomesh.data.packing.sampler import SamplerPosition
from evomesh.errors import UserError
from tests.support.covers import covers

weights = st.lists(
    st.integers(1, 50).map(lambda n: n / 7 if n % 2 else float(n)),
    min_size=1,
    max_size=6,
)


@given(weights, st.integers(0, 500))
@settings(max_examples=150, deadline=None)
def test_every_prefix_is_within_one_pack_of_its_share(
    found: list[float], start: int
) -> None:
    shares = MixtureSchedule(found)
    counts = shares.counts(start)
    exact = [
        Fraction(str(one)) / sum(Fraction(str(other)) for other in found)
        for one in found
    ]
    for n, source in enumerate(shares.take(start, 60), start + 1):
        counts[source] += 1
        assert all(
            abs(count - weight * n) < 1
            for count, weight in zip(counts, exact, strict=True)
        )


@given(weights, st.integers(0, 400), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_a_mixture_can_start_at_any_pack(
    found: list[float], start: int, size: int
) -> None:
    straight = MixtureSchedule(found).take(0, start + size)
    assert MixtureSchedule(found).take(start, size) == straight[start:]


def test_decimal_weights_repeat_without_drift() -> None:
    shares = MixtureSchedule([0.7, 0.2, 0.1])
    assert shares.period == 10
    assert shares.counts(10**9) == [700_000_000, 200_000_000, 100_000_000]


def sampler(
    global_batch: int = 4, rampup: BatchSizeRampup | None = None
) -> MixedSampler:
    sources = [
        WeightedSource("a", 0.75, np.arange(0, 7)),
        WeightedSource("b", 0.25, np.arange(7, 10)),
    ]
    return MixedSampler(sources, 5, global_batch, rampup)


def walk(
    mixed: MixedSampler, steps: int, position: SamplerPosition | None = None
) -> list[list[int]]:
    position, found = position or SamplerPosition(), []
    for _ in range(steps):
        packs, position = mixed.take(position)
        found.append(packs.tolist())
    return found


def test_an_exhausted_source_starts_its_next_pass() -> None:
    flat = [pack for step in walk(sampler(), 40) for pack in step]
    for low, high in ((0, 7), (7, 10)):
        own = [pack for pack in flat if low <= pack < high]
        size = high - low
        passes = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(sorted(one) == list(range(low, high)) for one in passes)
        assert passes[0] != passes[1] or passes[1] != passes[2]


@pytest.mark.parametrize("rampup", [None, BatchSizeRampup(2, 1, 3)])
@pytest.mark.parametrize("stop", [0, 1, 9, 23])
def test_resume(stop: int, rampup: BatchSizeRampup | None) -> None:
    straight = walk(sampler(rampup=rampup), stop + 8)
    stopped = sampler(rampup=rampup)
    state = json.loads(json.dumps(stopped.state(stopped.seek(stop))))
    resumed = sampler(rampup=rampup)
    assert walk(resumed, 8, resumed.resume(state)) == straight[stop:]
    with pytest.raises(UserError, match="num_packs"):
        sampler().resume(state | {"num_packs": {"a": 1}})


@covers("data.dataset_weights", "promise:dataset-weights")
def test_dataset_weights_of_a_config_set_the_shares(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1] * 400], "train/en/a.bin")
    write_bin([[2] * 400], "train/en/b.bin")
    write_bin([[3] * 100], "train/code/c.bin")
    write_bin([[4] * 100], "train/cn/d.bin")
    options: dict[str, Any] = {
        "seq_len": 4,
        "micro_num": 2,
        "num_worker": 1,
        "train_folder": str(tmp_path / "train"),
    }
    data = build_train_data(
        DataConfig(**options, dataset_weights={"en/": 3.0, "code/": 1.0}), 10
    )
    assert data.warnings == [
        "cn/d.bin matches no key of data.dataset_weights and is not trained on"
    ]
    stream = data.stream()
    first = [int(token) for _ in range(50) for token in next(stream).tokens[:, 0]]
    assert {token: first.count(token) for token in set(first)} == {
        1: first.count(1),
        2: 75 - first.count(1),
        3: 25,
    }
    state = json.loads(json.dumps(stream.state()))
    following = next(stream).tokens.tolist()
    stream.close()
    again = data.stream(state=state)
    assert next(again).tokens.tolist() == following
    again.close()
    for bad, part in (
        ({"en": 1.0, "en/a": 1.0}, "several keys"),
        ({"fr": 1.0}, "matches no file"),
        ({"en": 0.0}, "has weight 0.0"),
    ):
        with pytest.raises(UserError, match=part):
            build_train_data(DataConfig(**options, dataset_weights=bad), 10)
