"""Choosing a token, against transformers' own rules and the distribution it should follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from evomesh.errors import UserError
from evomesh.generate.options import LOWEST_TEMPERATURE, SamplingParams
from evomesh.generate.sample import TokenSampler, candidates, penalize
from tests.support.covers import covers

VOCAB = 50


@covers("generation.top_k", "generation.top_p", "generation.min_p")
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_candidates_follow_transformers(
    top_k: int, top_p: float, min_p: float, keep: int
) -> None:
    logits = (
        torch.randn(
            VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        * 3
    )
    scores = transformers.TemperatureLogitsWarper(0.7)(None, logits[None])
    scores = (
        transformers.TopKLogitsWarper(top_k, min_tokens_to_keep=keep)(None, scores)
        if top_k
        else scores
    )
    scores = (
        transformers.TopPLogitsWarper(top_p, min_tokens_to_keep=keep)(None, scores)
        if top_p < 1
        else scores
    )
    scores = (
        transformers.MinPLogitsWarper(min_p, min_tokens_to_keep=keep)(None, scores)
        if min_p
        else scores
    )
    ids, ours = candidates(
        logits,
        SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p),
        keep,
    )
    whole = torch.zeros(VOCAB, dtype=torch.float64).index_put((ids,), ours.softmax(-1))
    torch.testing.assert_close(whole, scores[0].softmax(-1), rtol=1e-12, atol=1e-15)


@covers("generation.repetition_penalty")
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_the_repetition_penalty_follows_transformers(penalty: float) -> None:
    logits = torch.randn(
        VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    seen = torch.tensor([3, 9, 3, 3, 40, 41])
    wanted = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
        seen[None], logits[None].clone()
    )[0]
    before = logits.clone()
    assert torch.equal(penalize(logits, seen, penalty), wanted)
    assert torch.equal(logits, before)


def test_the_lowest_temperature_leaves_equal_logits_their_chance() -> None:
    logits = torch.tensor([-60.0, 60.0, 60.0, 59.99])
    for top_p in (1.0, 0.9):
        sampling = SamplingParams(temperature=LOWEST_TEMPERATURE, top_p=top_p)
        assert not sampling.greedy
        sampler = TokenSampler(sampling, (0, 0))
        assert {sampler.next_token(logits) for _ in range(20)} == {1, 2}


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.8}, {}])
def test_draws_follow_the_distribution(options: dict[str, float]) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    sampling = SamplingParams(temperature=1.5, **options)
    sampler = TokenSampler(sampling, (0, 0))
    count = 4000
    drawn = (
        torch.bincount(
            torch.tensor([sampler.next_token(logits) for _ in range(count)]),
            minlength=4,
        )
        / count
    )
    ids, left = candidates(logits, sampling)
    wanted = torch.zeros(4, dtype=torch.float64).index_put((ids,), left.softmax(-1))
    deviation = (wanted * (1 - wanted) / count).sqrt()
    assert ((drawn - wanted).abs() <= 4 * deviation).all(), (drawn, wanted)


@covers("generation.do_sample", "generation.temperature")
def test_no_sampling_and_no_temperature_are_greedy() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9])
    not_sampled = SamplingParams(do_sample=False)
    # Logits over the last two are more than a float32 holds.
    cold = [SamplingParams(temperature=value) for value in (0.0, 1e-38, 5e-324)]
    for sampling in (not_sampled, *cold):
        assert {
            TokenSampler(sampling, (0, n)).next_token(logits) for n in range(20)
        } == {1}
    assert {
        TokenSampler(SamplingParams(), (0, n)).next_token(logits) for n in range(20)
    } > {1}


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"num_beams": 0},
        {"num_return_sequences": 0},
        {"seed": -1},
        {"max_new_tokens": 0},
        {"max_length": 0},
        {"logprobs": -2},
    ],
)
def test_impossible_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(
        UserError, match=f"{next(iter(bad))} is {next(iter(bad.values()))}"
    ):
        SamplingParams(**bad)


def test_more_answers_than_there_can_be_are_refused() -> None:
    with pytest.raises(UserError, match="num_return_sequences is 3"):
        SamplingParams(num_return_sequences=3, num_beams=2)
    with pytest.raises(UserError, match="num_return_sequences is 2"):
        SamplingParams(num_return_sequences=2, do_sample=False)
    SamplingParams(num_return_sequences=3)


def ranked_by_sorting(
    logits: torch.Tensor, sampling: SamplingParams
) -> tuple[list[int], torch.Tensor]:
    """Return the ids that remain, most probable first, and their probabilities, by sorting the whole vocabulary."""
    order = (logits.double() / sampling.temperature).sort(descending=True, stable=True)
    count = sampling.top_k or len(logits)
    probability = order.values[:count].softmax(-1)
    before = probability.cumsum(-1) - probability
    remaining = (before < sampling.top_p) | (sampling.top_p == 1)
    remaining &= probability >= sampling.min_p * probability[0]
    kept = probability[remaining]
    return order.indices[:count][remaining].tolist(), kept / kept.sum()


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.90003}, {"top_p": 0.50007, "top_k": 3000}, {"top_k": 40}]
)
@pytest.mark.parametrize(
    "shape", ["peaked", "flat", "equal", "ties", "two", "far", "infinite"]
)
def test_a_large_vocabulary_is_cut_and_drawn_as_if_it_were_sorted(
    shape: str, settings: dict[str, float]
) -> None:
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(4))
    logits = {
        "peaked": normal * 4,
        "flat": normal * 0.01,
        "equal": torch.zeros(20_000),
        "ties": (normal * 2).round(),
        "two": torch.where(normal > 3, 50.0, 0.0),
        "far": normal * 1e4,
        "infinite": torch.where(normal > 2, normal, -torch.inf),
    }[shape]
    sampling = SamplingParams(temperature=0.8, **settings)
    wanted, probability = ranked_by_sorting(logits, sampling)
    untouched = logits.clone()
    ids, left = candidates(logits.double(), sampling)
    assert sorted(ids.tolist()) == sorted(wanted)
    assert torch.equal(left, logits.double()[ids] / 0.8)

    # The same uniform numbers lead to the same tokens as in the sorted list.
    sampler = TokenSampler(sampling, (5, 0))
    random = np.random.default_rng((5, 0))
    cumulative = probability.cumsum(-1)
    for _ in range(50):
        index = int(torch.searchsorted(cumulative, random.random(), right=True))
        assert sampler.next_token(logits) == wanted[index]
    assert torch.equal(logits, untouched)
