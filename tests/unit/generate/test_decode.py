"""Lists of prompts: unequal ones in one batch, several answers each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evomesh.errors import UserError
from evomesh.generate.decode import generate_tokens, stream_tokens
from evomesh.generate.options import SamplingParams
from tests.support.decoders import tiny, uncached_greedy

PROMPTS = [[3, 7, 11], [20], [5, 4, 3, 2, 1, 9, 30]]
GREEDY = SamplingParams(do_sample=False, max_new_tokens=20)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_cached_greedy_equals_uncached(
    interleaved: bool, batch_size: int | None
) -> None:
    model = tiny(qk_interleaved=interleaved)
    together = generate_tokens(model, PROMPTS, GREEDY, batch_size=batch_size)
    assert together == [[uncached_greedy(model, prompt, 20)] for prompt in PROMPTS]
    # Not one token over and over.
    assert len({token for answers in together for token in answers[0]}) > 3


def test_answers_of_a_prompt_differ_and_do_not_depend_on_the_batch() -> None:
    model = tiny()
    drawn = SamplingParams(
        temperature=2.0, num_return_sequences=3, seed=5, max_new_tokens=15
    )
    together = generate_tokens(model, PROMPTS, drawn)
    assert len({tuple(answer) for answer in together[0]}) == 3
    assert generate_tokens(model, PROMPTS, drawn, batch_size=2) == together
    assert generate_tokens(model, PROMPTS[1:], drawn, numbers=[1, 2]) == together[1:]
    assert generate_tokens(model, PROMPTS[1:], drawn) != together[1:]


def test_the_stream_says_how_an_answer_ended() -> None:
    model = tiny()
    free = uncached_greedy(model, PROMPTS[0], 12)
    ends = SamplingParams(do_sample=False, max_new_tokens=12, eos_ids=(free[4],))
    mine = [new for new in stream_tokens(model, PROMPTS, ends) if new.prompt == 0]
    assert [new.token for new in mine] == free[: free.index(free[4]) + 1]
    assert [new.finish for new in mine][-1] == "stop"


def test_bad_prompts_are_named_before_anything_is_made() -> None:
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate_tokens(tiny(), [[1], []], GREEDY)
    with pytest.raises(UserError, match="prompt 2 contains id 50"):
        generate_tokens(tiny(), [[1], [2], [3, 50]], GREEDY)
    with pytest.raises(UserError, match="neither max_new_tokens nor max_length"):
        generate_tokens(tiny(), [[1]], SamplingParams())


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("token", [-1, 50])
def test_an_id_that_can_never_end_an_answer_is_refused(
    num_beams: int, token: int
) -> None:
    sampling = replace(GREEDY, eos_ids=(2, token), num_beams=num_beams)
    with pytest.raises(UserError, match=f"id {token} is outside the vocabulary"):
        generate_tokens(tiny(), [[1]], sampling)


def test_no_prompts_no_answers() -> None:
    assert generate_tokens(tiny(), [], GREEDY) == []
