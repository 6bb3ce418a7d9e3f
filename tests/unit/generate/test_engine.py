"""Continuous batching: every request as if it were alone, whatever comes and goes beside it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from evomesh.config.rope import RopeScaling
from evomesh.errors import UserError
from evomesh.generate.engine import GeneratedToken, GenerationEngine
from evomesh.generate.options import SamplingParams
from evomesh.layers.sequence_bounds import single_sequence
from tests.support.covers import covers
from tests.support.decoders import VOCAB, tiny, uncached_greedy

GREEDY = SamplingParams(do_sample=False, max_new_tokens=12)


def drain(engine: GenerationEngine) -> dict[int, list[GeneratedToken]]:
    made = defaultdict(list)
    while engine.active:
        for token in engine.step():
            made[token.request].append(token)
    return made


def ids(tokens: list[GeneratedToken]) -> list[int]:
    return [token.id for token in tokens]


def test_requests_that_come_and_go_get_their_own_greedy_tokens() -> None:
    model = tiny()
    engine = GenerationEngine(model, slots=2, context_length=40)
    prompts = [[3, 7, 11], [20], [5, 4, 3, 2, 1, 9, 30], [8, 8], [1, 2, 3, 4]]
    lengths = [12, 3, 7, 9, 5]
    made: dict[int, list[GeneratedToken]] = defaultdict(list)
    numbers = []
    # More requests than slots, and not at once.
    for prompt, length in zip(prompts, lengths, strict=True):
        numbers.append(
            engine.add(prompt, replace(GREEDY, max_new_tokens=length), (0, 0))
        )
        for token in engine.step():
            made[token.request].append(token)
    for request, tokens in drain(engine).items():
        made[request] += tokens
    for number, prompt, length in zip(numbers, prompts, lengths, strict=True):
        assert ids(made[number]) == uncached_greedy(model, prompt, length)
        assert [token.finish for token in made[number]] == [""] * (length - 1) + [
            "length"
        ]
    assert len({token.id for tokens in made.values() for token in tokens}) > 5


@covers("model.rope_scaling.type")
def test_requests_that_outgrow_the_short_factors_of_longrope_are_read_again() -> None:
    """Cached keys have the angles of texts of up to 9 tokens; the oracle rotates all tokens anew each time."""
    scaling = RopeScaling(
        type="longrope",
        short_factor=(1.0, 1.2, 1.4, 1.6),
        long_factor=(1.0, 3.0, 6.0, 9.0),
        original_max_position_embeddings=9,
    )
    model = tiny(rope_scaling=scaling, max_position_embeddings=64)
    engine = GenerationEngine(model, slots=2, context_length=40)
    prompts = [[3, 7, 11], list(range(9)), list(range(10)), [5, 4, 3, 2, 1, 9, 30]]
    scored = replace(GREEDY, score_prompt=True)
    numbers = [engine.add(prompt, scored, (0, 0)) for prompt in prompts]
    made = drain(engine)
    for number, prompt in zip(numbers, prompts, strict=True):
        assert ids(made[number]) == uncached_greedy(model, prompt, 12)
        scores = [len(token.prompt_scores) for token in made[number]]
        assert scores == [len(prompt)] + [0] * 11


def test_each_active_request_gets_one_token_a_step_and_waiting_ones_wait() -> None:
    engine = GenerationEngine(tiny(), slots=2, context_length=20)
    for _ in range(3):
        engine.add([1, 2], GREEDY, (0, 0))
    assert (engine.active, engine.waiting) == (3, 3)
    assert [token.request for token in engine.step()] == [0, 1]
    assert (engine.active, engine.waiting) == (3, 1)
    engine.cancel(0)
    assert sorted(token.request for token in engine.step()) == [1, 2]
    engine.cancel(0)
    engine.cancel(99)
    assert engine.active == 2


def test_cancelling_leaves_the_others_as_they_are() -> None:
    model = tiny()
    engine = GenerationEngine(model, slots=3, context_length=20)
    prompts = [[3, 7, 11], [20], [5, 4, 3]]
    numbers = [engine.add(prompt, GREEDY, (0, 0)) for prompt in prompts]
    made = defaultdict(list)
    for _ in range(4):
        for token in engine.step():
            made[token.request].append(token)
    engine.cancel(numbers[0])
    for request, tokens in drain(engine).items():
        made[request] += tokens
    assert len(made[numbers[0]]) == 4
    assert [ids(made[n]) for n in numbers[1:]] == [
        uncached_greedy(model, prompt, 12) for prompt in prompts[1:]
    ]


def test_long_prompts_are_not_all_read_in_one_step() -> None:
    engine = GenerationEngine(tiny(), slots=4, context_length=20, prefill_tokens=10)
    for _ in range(4):
        engine.add([1] * 6, GREEDY, (0, 0))
    assert [len(engine.step()) for _ in range(4)] == [1, 2, 3, 4]


@covers("generation.eos_id", "generation.additional_eos_token_list")
def test_every_end_token_stops() -> None:
    model = tiny()
    free = uncached_greedy(model, [3, 7, 11], 12)
    for stop in ((49, free[4]), (free[4], free[2])):
        engine = GenerationEngine(model, slots=1, context_length=20)
        engine.add([3, 7, 11], replace(GREEDY, eos_ids=stop), (0, 0))
        (tokens,) = drain(engine).values()
        place = min(free.index(token) for token in stop if token in free)
        assert ids(tokens) == free[: place + 1]
        assert [token.finish for token in tokens][-1] == "stop"
        assert not any(token.finish for token in tokens[:-1])


@covers("generation.max_length", "generation.max_new_tokens")
def test_limits_count_as_documented() -> None:
    def count(prompt: int, **options: int) -> int:
        engine = GenerationEngine(tiny(), slots=1, context_length=16)
        engine.add([1] * prompt, SamplingParams(do_sample=False, **options), (0, 0))
        (tokens,) = drain(engine).values()
        return len(tokens)

    assert count(4, max_length=10) == 6  # with the prompt
    assert count(4, max_new_tokens=10) == 10
    assert count(4, max_length=5, max_new_tokens=10) == 10
    assert count(4) == 12  # as many as there is room for
    assert count(4, max_new_tokens=100) == 12
    assert count(12, max_length=8) == 1


@covers("generation.seed")
def test_draws_depend_on_seed_and_request_number_alone() -> None:
    model = tiny()
    drawn = SamplingParams(temperature=2.0, max_new_tokens=15)

    def answer(stream: tuple[int, int], beside: int) -> list[int]:
        engine = GenerationEngine(model, slots=4, context_length=30)
        others = [engine.add([9] * (2 + n), drawn, (7, 100 + n)) for n in range(beside)]
        number = engine.add([3, 7], drawn, stream)
        made = drain(engine)
        assert len(made) == len(others) + 1
        return ids(made[number])

    assert answer((5, 0), 0) == answer((5, 0), 3)
    answers = {
        tuple(answer((seed, request), 0)) for seed in (5, 6) for request in (0, 1, 2)
    }
    assert len(answers) == 6


def test_logprobs_are_those_of_the_model() -> None:
    model = tiny()
    engine = GenerationEngine(model, slots=2, context_length=30)
    first = engine.add(
        [3, 7], SamplingParams(temperature=0.5, logprobs=3, max_new_tokens=5), (1, 1)
    )
    second = engine.add([3, 7, 8], replace(GREEDY, logprobs=0), (1, 1))
    third = engine.add([3], GREEDY, (1, 1))
    made = drain(engine)
    row = [3, 7]
    for token in made[first]:
        with torch.no_grad():
            wanted = model.logits(model(torch.tensor(row), single_sequence(len(row))))[
                -1
            ].log_softmax(-1)
        assert token.logprob == pytest.approx(float(wanted[token.id]), abs=1e-12)
        best = wanted.topk(3)
        assert [number for number, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(
            best.values.tolist(), abs=1e-12
        )
        row.append(token.id)
    assert all(token.top == [] and token.logprob is not None for token in made[second])
    assert all(token.top == [] and token.logprob is None for token in made[third])


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "is empty"),
        ([1] * 20, {}, "has 20 tokens"),
        ([1, VOCAB], {}, f"id {VOCAB}"),
        ([-1], {}, "id -1"),
        ([1], {"num_beams": 2}, "num_beams=2"),
        ([1], {"num_return_sequences": 2}, "num_return_sequences=2"),
    ],
)
def test_impossible_requests_are_refused(
    prompt: list[int], options: dict[str, int], words: str
) -> None:
    engine = GenerationEngine(tiny(), slots=1, context_length=20)
    with pytest.raises(UserError, match=words):
        engine.add(prompt, SamplingParams(**options), (0, 0))
    assert engine.active == 0


def test_logits_that_are_no_numbers_end_nothing_else() -> None:
    model = tiny()
    with torch.no_grad():
        model.embedding.weight[9] = float("nan")
    engine = GenerationEngine(model, slots=2, context_length=20)
    bad = engine.add(
        [9], SamplingParams(top_p=0.9, top_k=5, min_p=0.1, max_new_tokens=3), (0, 0)
    )
    good = engine.add([3, 7, 11], replace(GREEDY, max_new_tokens=6), (0, 0))
    # In the slot of the bad one.
    after = engine.add([3], replace(GREEDY, max_new_tokens=6), (0, 0))
    made = drain(engine)
    assert len(made[bad]) == 3 and all(0 <= token.id < VOCAB for token in made[bad])
    assert ids(made[good]) == uncached_greedy(model, [3, 7, 11], 6)
    assert ids(made[after]) == uncached_greedy(model, [3], 6)
