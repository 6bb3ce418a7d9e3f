"""Sampling parameters from a config, a request and the command line mean the same."""

from __future__ import annotations

import pytest

from evomesh.config.schema import GenerationConfig
from evomesh.errors import UserError
from evomesh.generate.options import SamplingParams
from evomesh.serve.schema import ChatRequest, CompletionRequest

VALUES = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
}


def test_a_config_section_sets_every_parameter_of_its_name() -> None:
    section = GenerationConfig(
        **VALUES,
        do_sample=False,
        num_beams=4,
        length_penalty=2.0,
        num_return_sequences=2,
        seed=5,
        max_new_tokens=11,
        max_length=12,
        eos_id=(2, 3),
        additional_eos_token_list=(9,),
    )
    assert SamplingParams.from_config(section) == SamplingParams(
        **VALUES,
        do_sample=False,
        num_beams=4,
        length_penalty=2.0,
        num_return_sequences=2,
        seed=5,
        max_new_tokens=11,
        max_length=12,
        eos_ids=(2, 3, 9),
    )


def test_requests_set_what_they_name() -> None:
    wanted = SamplingParams(
        **VALUES, seed=2**64 - 3, max_new_tokens=16, eos_ids=(2,), logprobs=4
    )
    completion = CompletionRequest(model="m", prompt="a", seed=-3, logprobs=4, **VALUES)
    assert completion.sampling_params((2,)) == wanted
    chat = ChatRequest(
        model="m",
        messages=[{"role": "user", "content": "a"}],
        seed=-3,
        logprobs=True,
        top_logprobs=4,
        max_tokens=99,
        max_completion_tokens=16,
        **VALUES,
    )
    assert chat.sampling_params((2,)) == wanted
    seeds = {
        CompletionRequest(model="m", prompt="a").sampling_params(()).seed
        for _ in range(2)
    }
    assert len(seeds) == 2  # without a seed, each request has its own
    assert (
        CompletionRequest(model="m", prompt="a", temperature=0)
        .sampling_params(())
        .greedy
    )


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_new_tokens": 5}, 15),
        ({"max_new_tokens": 5, "max_length": 12}, 15),
        ({"max_new_tokens": 50}, 32),
        ({"max_length": 12}, 12),
        ({"max_length": 4}, 11),
        ({}, 32),
    ],
)
def test_prompt_and_completion_share_the_context_length(
    options: dict[str, int], length: int
) -> None:
    assert SamplingParams(**options).max_total_length(10, 32) == length


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"temperature": 0.0}, {"num_beams": 2}]
)
def test_more_completions_than_there_are_different_ones_are_refused(
    options: dict[str, float],
) -> None:
    with pytest.raises(UserError, match="num_return_sequences is 3"):
        SamplingParams(**options, num_return_sequences=3)
