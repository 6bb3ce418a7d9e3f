"""Token for token what ``transformers.generate`` makes of the same weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pytest
import torch
import transformers

from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.language_model import LanguageModel
from tests.support.covers import covers
from tests.support.decoders import tiny, tiny_config
from tests.support.stock import stock_llama

pytestmark = pytest.mark.slow

PROMPTS = [[3, 7, 11], [20], [5, 4, 3, 2, 1, 9, 30]]
Pair = tuple[LanguageModel, "transformers.LlamaForCausalLM"]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny(), stock_llama(tiny(), tiny_config())


def theirs(
    model: transformers.LlamaForCausalLM, prompt: list[int], sampling: SamplingParams
) -> list[list[int]]:
    """The answers of transformers, without the padding behind an end token."""
    wanted = asdict(sampling)
    del wanted["seed"], wanted["logprobs"]
    ends = list(wanted.pop("eos_ids"))
    options = {key: value for key, value in wanted.items() if value is not None}
    config = transformers.GenerationConfig(
        **options, eos_token_id=ends or None, pad_token_id=0
    )
    out = model.generate(
        torch.tensor([prompt]),
        generation_config=config,
        attention_mask=torch.ones(1, len(prompt)),
    )
    rows = [row[len(prompt) :].tolist() for row in out]
    ended = [[i for i, token in enumerate(row) if token in ends] for row in rows]
    return [
        row[: end[0] + 1] if end else row for row, end in zip(rows, ended, strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 24},
        {"max_length": 24},
        {"max_new_tokens": 24, "repetition_penalty": 1.3},
        {"max_new_tokens": 24, "eos_ids": (6, 21, 40)},
    ],
)
def test_greedy(pair: Pair, options: dict[str, float]) -> None:
    ours, stock = pair
    sampling = SamplingParams(do_sample=False, **options)
    assert generate_tokens(ours, PROMPTS, sampling) == [
        theirs(stock, prompt, sampling) for prompt in PROMPTS
    ]


@covers("generation.num_beams", "generation.length_penalty")
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.5, 2.5])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 4, "eos_ids": (6, 21, 40)},
        {"num_beams": 3, "num_return_sequences": 2, "eos_ids": tuple(range(0, 50, 2))},
        {"num_beams": 2, "repetition_penalty": 1.3},
        {
            "num_beams": 5,
            "num_return_sequences": 5,
            "eos_ids": (6, 21),
            "max_length": 12,
            "max_new_tokens": None,
        },
    ],
)
def test_beams(pair: Pair, options: dict[str, float], length_penalty: float) -> None:
    ours, stock = pair
    sampling = SamplingParams(
        **{"do_sample": False, "max_new_tokens": 16, "length_penalty": length_penalty}
        | options
    )
    together = generate_tokens(ours, PROMPTS, sampling)
    assert together == [theirs(stock, prompt, sampling) for prompt in PROMPTS]
    assert generate_tokens(ours, PROMPTS, sampling, batch_size=2) == together


@covers("promise:dynamic-ntk")
def test_dynamic_ntk_beyond_the_trained_length() -> None:
    """Cached keys keep the base of the length they were made at, as in transformers."""
    config = tiny_config(
        max_position_embeddings=16, use_dynamic_ntk_rope=True, rope_scaling_factor=2.0
    )
    # Its completion reaches 8 times the trained length.
    long_prompt = [n % 50 for n in range(88)]
    for prompt in ([3, 7, 11], long_prompt):
        ours = tiny(
            max_position_embeddings=16,
            use_dynamic_ntk_rope=True,
            rope_scaling_factor=2.0,
        )
        stock = stock_llama(ours, config, rope_type="dynamic", factor=2.0)
        sampling = SamplingParams(do_sample=False, max_new_tokens=40)
        made = generate_tokens(ours, [prompt, [9, 9]], sampling)[0]
        assert made == theirs(stock, prompt, sampling)
        assert made != generate_tokens(tiny(), [prompt], sampling)[0]


def test_samples_follow_the_model_and_the_cuts(pair: Pair) -> None:
    """Two-token answers, counted, against the product of two distributions from plain forward passes."""
    ours, _ = pair
    sampling = SamplingParams(
        temperature=2.0, top_k=4, top_p=0.9, max_new_tokens=2, num_return_sequences=2000
    )
    counted = Counter(
        tuple(answer) for answer in generate_tokens(ours, [[3, 7, 11]], sampling)[0]
    )
    wanted = {}
    for first, share in distribution(ours, [3, 7, 11], sampling).items():
        for second, following in distribution(
            ours, [3, 7, 11, first], sampling
        ).items():
            wanted[first, second] = share * following
    assert set(counted) <= set(wanted)
    for pair_, share in wanted.items():
        deviation = (share * (1 - share) / 2000) ** 0.5
        assert abs(counted[pair_] / 2000 - share) <= 4 * deviation, (
            pair_,
            counted[pair_],
            share,
        )


def distribution(
    model: LanguageModel, ids: list[int], sampling: SamplingParams
) -> dict[int, float]:
    """Apply the definition: the k most probable tokens, of these the smallest set whose probability reaches p."""
    with torch.no_grad():
        logits = (
            model.logits(model(torch.tensor(ids), single_sequence(len(ids))))[-1]
            / sampling.temperature
        )
    best = sorted(
        ((float(value), token) for token, value in enumerate(logits)), reverse=True
    )[: sampling.top_k]
    total = sum(2.718281828459045**value for value, _ in best)
    head: dict[int, float] = {}
    for value, token in best:
        if sum(head.values()) < sampling.top_p:
            head[token] = 2.718281828459045**value / total
    return {token: share / sum(head.values()) for token, share in head.items()}


def test_drawn_beams(pair: Pair) -> None:
    """With as many beams as there are answers of one token, the best one always wins; else the seed decides."""
    ours, _ = pair
    every = SamplingParams(
        num_beams=50, num_return_sequences=50, max_new_tokens=1, seed=1
    )
    logits = ours.logits(ours(torch.tensor([3, 7]), single_sequence(2)))[-1]
    assert generate_tokens(ours, [[3, 7]], every)[0] == [
        [token] for token in logits.argsort(descending=True).tolist()
    ]
    answers = [
        generate_tokens(
            ours,
            [[3, 7]],
            SamplingParams(num_beams=2, temperature=3.0, max_new_tokens=8, seed=seed),
        )[0][0]
        for seed in (1, 1, 2, 3)
    ]
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers}) > 1
