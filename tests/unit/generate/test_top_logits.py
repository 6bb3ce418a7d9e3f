"""Tokens drawn from the largest logits alone, against the draws from whole rows with the same random numbers."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from evomesh.generate import top_logits
from evomesh.generate.options import SamplingParams
from evomesh.generate.sample import TokenSampler
from evomesh.generate.top_logits import choose_from_top, pack_top
from tests.support.pretend_device import pretend_device

VOCAB = 2000
TOP = 64
REPEATS = 3


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_logits, "TOP", TOP)


@pytest.fixture
def copied_rows(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the rows that are drawn whole."""
    rows: Counter[str] = Counter()
    draw = top_logits.draw_token

    def counted(logits: Tensor, sampling: SamplingParams, uniform: float) -> int:
        rows["whole"] += 1
        return draw(logits, sampling, uniform)

    monkeypatch.setattr(top_logits, "draw_token", counted)
    return rows


def shapes(dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(4)
    normal = torch.randn(VOCAB, generator=random, dtype=torch.float64)
    few = torch.full((VOCAB,), -torch.inf, dtype=torch.float64)
    few[[7, 1500, 30]] = 1.0
    zeros = torch.where(normal > 0, 0.0, -0.0)
    rows = {
        "peaked": normal * 4,
        "16-bit": (normal * 4).bfloat16().double(),
        "flat": normal * 0.01,
        "equal": torch.zeros(VOCAB, dtype=torch.float64),
        "signs of zero": zeros,
        "ties": (normal * 2).round(),
        "two": torch.where(normal > 2, 50.0, 0.0),
        "far": normal * 1e4,
        "negative": normal - 900,
        "few": few,
    }
    return {name: row.to(dtype) for name, row in rows.items()}


SETTINGS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in product(
        (0.3, 2.0), (0, 1, 40, TOP, TOP + 1), (1.0, 0.9, 0.5), (0.0, 0.05, 1.0)
    )
]
SETTINGS += [SamplingParams(do_sample=False), SamplingParams(temperature=0.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_those_from_the_whole_row(
    dtype: torch.dtype, copied_rows: Counter[str]
) -> None:
    rows = list(shapes(dtype).values())
    for sampling in SETTINGS:
        streams = [(5, row) for row in range(len(rows))]
        ours = [TokenSampler(sampling, stream) for stream in streams]
        wanted = [TokenSampler(sampling, stream) for stream in streams]
        for _ in range(REPEATS):
            expected = [
                sampler.next_token(row)
                for sampler, row in zip(wanted, rows, strict=True)
            ]
            assert choose_from_top(ours, torch.stack(rows)) == expected, sampling
    # Both ways were taken.
    total = len(SETTINGS) * REPEATS * len(rows)
    assert 0.2 * total < copied_rows["whole"] < 0.8 * total


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(top_k=TOP),
        SamplingParams(top_k=40, top_p=0.95),
        SamplingParams(temperature=0.5, top_p=0.9),
        SamplingParams(min_p=0.1),
        SamplingParams(do_sample=False),
    ],
)
@pytest.mark.parametrize("name", ["peaked", "16-bit"])
def test_rows_of_a_language_model_need_no_second_copy(
    name: str, sampling: SamplingParams, copied_rows: Counter[str]
) -> None:
    rows = shapes(torch.float32)[name].repeat(50, 1)
    choose_from_top([TokenSampler(sampling, (1, row)) for row in range(50)], rows)
    assert not copied_rows


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_rows_of_a_broken_model_are_drawn_whole(
    bad: float, copied_rows: Counter[str]
) -> None:
    row = shapes(torch.float32)["peaked"]
    broken = row.clone()
    broken[1200] = bad
    for sampling in (SamplingParams(top_k=3), SamplingParams(do_sample=False)):
        copied_rows.clear()
        ours = [TokenSampler(sampling, (0, 0)) for _ in range(2)]
        expected = [
            TokenSampler(sampling, (0, 0)).next_token(each) for each in (broken, row)
        ]
        assert choose_from_top(ours, torch.stack([broken, row])) == expected
        assert copied_rows["whole"] == 1


def test_a_cut_between_equal_probabilities_is_left_to_the_whole_row(
    copied_rows: Counter[str],
) -> None:
    """Half of the probability is reached with the first of two equal tokens, and rounding decides whether it is."""
    row = torch.full((VOCAB,), -torch.inf)
    row[[10, 20]] = 0.0
    sampling = SamplingParams(top_p=0.5)
    expected = TokenSampler(sampling, (0, 0)).next_token(row)
    assert choose_from_top([TokenSampler(sampling, (0, 0))], row[None]) == [expected]
    assert copied_rows["whole"] == 1


@pytest.mark.parametrize(
    ("bound", "below"),
    [(1.5, 1), (2.0, None), (2 + 1e-12, None), (2 - 1e-12, None), (2 + 1e-6, 2)],
)
def test_sums_that_rounding_could_move_over_a_bound_decide_nothing(
    bound: float, below: int | None
) -> None:
    sums = np.array([1.0, 2.0, 3.0])
    assert top_logits.certain_count(sums, bound) == below


def test_equal_logits_are_ranked_by_id() -> None:
    row = shapes(torch.float32)["ties"]
    packed = pack_top(row[None], [SamplingParams()])[0]
    wanted = row.sort(descending=True, stable=True)
    assert packed[:TOP].tolist() == wanted.values[:TOP].tolist()
    assert packed[TOP : 2 * TOP].tolist() == wanted.indices[:TOP].tolist()
    weights = (row.double() - row.max()).exp()
    assert float(packed[-1]) == pytest.approx(float(weights.sum()), rel=1e-12)


def test_a_step_makes_one_copy_to_the_host() -> None:
    rows = shapes(torch.float32)["peaked"].repeat(5, 1)
    settings = [
        SamplingParams(temperature=0.3 + row / 8, top_p=0.9) for row in range(4)
    ]
    settings.append(SamplingParams(do_sample=False))
    samplers = [TokenSampler(one, (0, row)) for row, one in enumerate(settings)]
    with pretend_device() as device:
        choose_from_top(samplers, rows)
    assert device.copies == [(5, 2 * TOP + 1)]
    # The rule for whole rows copies each of them.
    with pretend_device() as device:
        top_logits.choose_tokens(samplers, rows)
    assert device.copies == [(VOCAB,)] * 5


def test_undecided_rows_come_in_one_more_copy() -> None:
    rows = torch.stack(
        [shapes(torch.float32)[name] for name in ("peaked", "flat", "equal")]
    )
    samplers = [TokenSampler(SamplingParams(top_p=0.9), (0, row)) for row in range(3)]
    with pretend_device() as device:
        choose_from_top(samplers, rows)
    assert device.copies == [(3, 2 * TOP + 1), (2, VOCAB)]
