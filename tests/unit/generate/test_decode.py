"""Decoding with a cache against decoding without one, and sampling against transformers' own rules."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from evomesh.config.schema import ModelConfig
from evomesh.errors import UserError
from evomesh.generate.decode import generate, stream
from evomesh.generate.sample import Sampling, TokenSampler, candidates
from evomesh.layers.documents import whole
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model, initialize_weights

VOCAB = 50


def tiny(**changes: object) -> LanguageModel:
    shape = dict(num_layers=2, hidden_size=32, num_attention_heads=4, num_kv_attention_heads=2, vocab_size=VOCAB)
    config = ModelConfig(model_type="LLAMA2", dtype="float64", mlp_ratio=2.0, multiple_of=8, **(shape | changes))
    model = build_model(config)
    initialize_weights(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for the argmax to depend on the context
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


def uncached_greedy(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            hidden = model(torch.tensor(ids), whole(len(ids)))
            ids.append(int(model.logits(hidden[-1:])[0].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("interleaved", [False, True])
def test_cached_greedy_equals_uncached_for_unequal_prompts_in_one_batch(interleaved: bool) -> None:
    model = tiny(qk_interleaved=interleaved)
    prompts = [[3, 7, 11], [20], [5, 4, 3, 2, 1, 9, 30]]
    together = generate(model, prompts, max_new_tokens=20)
    assert together == [uncached_greedy(model, prompt, 20) for prompt in prompts]
    assert len({token for tokens in together for token in tokens}) > 3  # not one token over and over


def test_cached_logits_equal_uncached_logits() -> None:
    from evomesh.generate.cache import KeyValueCache

    model = tiny()
    ids = torch.randint(VOCAB, (12,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.logits(model(ids, whole(12)))
        cache = KeyValueCache([5], 12)
        seen = [model.logits(model(ids[:5], cache.documents(torch.device("cpu")), cache.attend))]
        for place in range(5, 12):
            docs = cache.documents(torch.device("cpu"))
            seen.append(model.logits(model(ids[place : place + 1], docs, cache.attend)))
            cache.advance()
    torch.testing.assert_close(torch.cat(seen), wanted, rtol=0, atol=1e-12)


def test_a_sequence_ends_with_the_first_eos_and_the_others_go_on() -> None:
    model = tiny()
    prompts = [[3, 7, 11], [20]]
    first, second = generate(model, prompts, max_new_tokens=12)
    eos = first[4]
    stopped = first[: first.index(eos) + 1]
    other = second[: second.index(eos) + 1] if eos in second else second
    assert generate(model, prompts, max_new_tokens=12, eos_ids=[eos]) == [stopped, other]
    last = [new for new in stream(model, prompts, max_new_tokens=12, eos_ids=[eos]) if new.sequence == 0][-1]
    assert (last.token, last.end) == (eos, "eos")


def test_sampled_tokens_depend_on_seed_and_request_but_not_on_the_batch() -> None:
    model = tiny()
    sampling = Sampling(temperature=2.0, top_k=0, seed=5)
    alone = generate(model, [[3, 7]], max_new_tokens=15, sampling=sampling)[0]
    beside = generate(model, [[3, 7], [8, 9, 10, 11]], max_new_tokens=15, sampling=sampling)[0]
    other_seed = generate(model, [[3, 7]], max_new_tokens=15, sampling=Sampling(temperature=2.0, seed=6))[0]
    assert alone == beside != other_seed


@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_candidates_follow_transformers(top_k: int, top_p: float) -> None:
    logits = torch.randn(VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    scores = TemperatureLogitsWarper(0.7)(None, logits[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    ours = candidates(logits, Sampling(temperature=0.7, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(ours, scores[0].softmax(-1), rtol=1e-12, atol=1e-15)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    sampling = Sampling(temperature=1.5, top_k=3)
    sampler = TokenSampler(sampling)
    count = 4000
    drawn = torch.bincount(torch.tensor([sampler.next(logits) for _ in range(count)]), minlength=4) / count
    wanted = candidates(logits, sampling)
    deviation = (wanted * (1 - wanted) / count).sqrt()
    assert ((drawn - wanted).abs() <= 4 * deviation).all(), (drawn, wanted)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_impossible_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(bad))} is {next(iter(bad.values()))}"):
        Sampling(**bad)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(tiny(), [[1], []], max_new_tokens=2)
