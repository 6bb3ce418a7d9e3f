"""``data.sample_every``: the model answers prompts while it trains, and the training does not notice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from evomesh.config.schema import Config
from evomesh.data.chat import end_of_answer_ids
from evomesh.data.tokenizer import (
    Tokenizer,
    check_tokenizer_fits,
    encode_prompt,
    load_tokenizer,
)
from evomesh.errors import UserError
from evomesh.generate.options import SamplingParams
from evomesh.generate.sample import TokenSampler
from evomesh.train.launch import RunContext
from evomesh.train.stages import ModelStages
from evomesh.train.text_passes import TextPasses


@dataclass(frozen=True)
class PromptSample:
    """An answer of the model in training.

    Attributes:
        new_tokens: length of the answer, its end id included.
        finish: "stop" for an id that ends the answer, "length" for the last one that fits.
    """

    prompt: str
    text: str
    new_tokens: int
    finish: str


@dataclass
class GrowingAnswer:
    """A prompt with the tokens of its answer so far."""

    ids: list[int]
    prompt_length: int
    max_length: int
    sampler: TokenSampler
    finish: str = ""

    def append(self, token: int) -> None:
        self.ids.append(token)
        if token in self.sampler.sampling.eos_ids:
            self.finish = "stop"
        elif len(self.ids) >= self.max_length:
            self.finish = "length"

    @property
    def answer(self) -> list[int]:
        """The tokens of the answer, without the id that ends it."""
        end = len(self.ids) - (self.finish == "stop")
        return self.ids[self.prompt_length : end]


def grow_answers(
    passes: TextPasses,
    answers: Sequence[GrowingAnswer],
    after_token: Callable[[], None] | None = None,
) -> None:
    """Append tokens to the answers until each has its end; all ranks get the same ones.

    Args:
        after_token: called after each round of tokens; may end answers.
    """
    while running := [answer for answer in answers if not answer.finish]:
        texts = [answer.ids for answer in running]
        logits = passes.next_logits(texts)
        chosen = None
        if logits is not None:
            chosen = _choose(running, logits)
        tokens = passes.agree(chosen, len(running))
        for answer, token in zip(running, tokens, strict=True):
            answer.append(token)
        if after_token is not None:
            after_token()


def _choose(
    answers: Sequence[GrowingAnswer],
    logits: Tensor,
) -> list[int]:
    """Return the next token of each answer by its row of the logits [R, V]."""
    samplers = [answer.sampler for answer in answers]
    if all(sampler.sampling.greedy for sampler in samplers):
        best: list[int] = logits.argmax(-1).tolist()
        return best
    on_host = logits.cpu()
    chosen: list[int] = []
    for sampler, row in zip(samplers, on_host, strict=True):
        token = sampler.next_token(row)
        chosen.append(token)
    return chosen


class PromptSampler:
    """Answers the prompts of ``data.samples``; every rank of the run takes part.

    Raises:
        UserError: the tokenizer cannot be used, or a prompt has no tokens or leaves no room for an answer.
    """

    def __init__(
        self, config: Config, stages: ModelStages, context: RunContext
    ) -> None:
        samples = config.data.samples
        assert samples is not None and config.data.tokenizer_path is not None
        self.every = config.data.sample_every
        self.module = stages.module
        self.passes = TextPasses(config, stages, context)
        self.context_length = config.data.seq_len
        self.tokenizer = load_tokenizer(
            config.data.tokenizer_path, "data.tokenizer_path"
        )
        vocab_size = config.model.vocab_size
        check_tokenizer_fits(self.tokenizer, vocab_size)
        eos_ids = end_of_answer_ids(self.tokenizer, config.generation, vocab_size)
        self.sampling = SamplingParams.from_settings(samples, eos_ids=eos_ids)
        self.prompts = [
            (text, _prompt_ids(self.tokenizer, text, self.context_length))
            for text in samples.prompts
        ]

    def answers(self) -> list[PromptSample]:
        """Return an answer to each prompt by the weights as they are now."""
        growing = [self._growing_answer(number) for number in range(len(self.prompts))]
        with evaluated(self.module, self.passes.device):
            grow_answers(self.passes, growing)
        return [self._sample(number, answer) for number, answer in enumerate(growing)]

    def _sample(self, number: int, answer: GrowingAnswer) -> PromptSample:
        """Return a finished answer as it is recorded."""
        prompt, _ = self.prompts[number]
        text = self.tokenizer.decode(answer.answer)
        new_tokens = len(answer.ids) - answer.prompt_length
        return PromptSample(prompt, text, new_tokens, answer.finish)

    def _growing_answer(self, number: int) -> GrowingAnswer:
        """Return an answer to a prompt without tokens; each prompt has a separate stream of random numbers."""
        _, ids = self.prompts[number]
        length = len(ids)
        longest = self.sampling.max_total_length(length, self.context_length)
        stream = (self.sampling.seed, number)
        sampler = TokenSampler(self.sampling, stream)
        return GrowingAnswer(list(ids), length, longest, sampler)


def _prompt_ids(tokenizer: Tokenizer, text: str, context_length: int) -> list[int]:
    ids = encode_prompt(tokenizer, text)
    if not 0 < len(ids) < context_length:
        raise UserError(
            f"the prompt {text[:60]!r} has {len(ids)} tokens",
            where="data.samples.prompts",
            expected=f"from 1 to {context_length - 1}: data.seq_len={context_length} has prompt and answer",
            code="EVO-GEN-002",
        )
    return ids


@contextmanager
def evaluated(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model into evaluation mode, and give the training its random numbers back afterwards."""
    was_training = module.training
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    module.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        module.train(was_training)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
