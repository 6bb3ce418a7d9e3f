"""Continuous batching: requests come and go between steps, each step makes one token of every request that runs.

Shapes: B requests, D model, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evomesh.errors import UserError
from evomesh.generate.cache import KeyValueCache
from evomesh.generate.options import SamplingParams
from evomesh.generate.sample import TokenSampler, penalised, plain_greedy, report
from evomesh.models.language_model import LanguageModel


@dataclass(frozen=True)
class GeneratedToken:
    """One step of one request.

    Attributes:
        logprob: of ``id`` by the model's own distribution, before penalty and temperature; None unless asked for.
        top: (id, log-probability) of the likeliest tokens, as many as asked for.
        finish: "stop" with an id that ends the answer, "length" with the last one there is room for, else "".
    """

    request: int
    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    finish: str = ""


@dataclass
class _ActiveRequest:
    number: int
    ids: list[int]  # prompt, then answer
    sampling: SamplingParams
    sampler: TokenSampler
    limit: int


class GenerationEngine:
    """A model, its key/value cache, and the requests in it. Neither threads nor clocks: the caller drives ``step``.

    A request's tokens do not depend on what else is in the batch, up to the rounding of matrix products.

    Args:
        model: in evaluation mode; where its parameters are, it computes.
        slots: requests that run at the same time; further ones wait their turn.
        max_tokens: most tokens of one request, prompt and answer together. Keys and values for slots * max_tokens
            tokens are kept from the first step on.
        vocab_size: refuse prompts with other ids than 0 .. vocab_size - 1; None: the model's own, if it tells.
        prefill_tokens: prompts that are read in one step hold at most so many tokens together (a longer one goes
            alone), so that running requests do not wait long for them.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int,
        max_tokens: int,
        vocab_size: int | None = None,
        prefill_tokens: int = 8192,
    ) -> None:
        if slots < 1 or max_tokens < 2:
            raise UserError(f"slots={slots}, max_tokens={max_tokens}", expected="at least 1 slot of 2 tokens")
        self.model, self.slots, self.max_tokens, self.prefill_tokens = (
            model,
            slots,
            max_tokens,
            prefill_tokens,
        )
        self.vocab_size = vocab_size or getattr(getattr(model, "config", None), "vocab_size", None)
        self.device = next(model.parameters()).device
        self.cache = KeyValueCache(slots, max_tokens)
        self._running: list[_ActiveRequest] = []  # by slot
        self._waiting: deque[_ActiveRequest] = deque()
        self._next = 0

    @property
    def active(self) -> int:
        """Requests that are not finished, waiting ones included."""
        return len(self._running) + len(self._waiting)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    def add(self, prompt: Sequence[int], sampling: SamplingParams, stream: tuple[int, int]) -> int:
        """Queues a request and returns its number, which its tokens bear.

        Args:
            prompt: token ids.
            sampling: ``num_beams`` and ``num_return_sequences`` of 1: add a request for each answer, and see
                ``beam.py``.
            stream: (seed, request): equal ones draw equal random numbers.
        Raises:
            UserError: the prompt is empty, leaves no room for an answer, or holds ids the model does not know.
        """
        check_prompt(prompt, self.max_tokens, self.vocab_size)
        if sampling.num_beams > 1 or sampling.num_return_sequences > 1:
            raise UserError(
                f"num_beams={sampling.num_beams}, num_return_sequences={sampling.num_return_sequences}",
                expected="1 and 1: this engine makes one answer a request",
            )
        number, self._next = self._next, self._next + 1
        limit = sampling.limit(len(prompt), self.max_tokens)
        self._waiting.append(
            _ActiveRequest(number, list(prompt), sampling, TokenSampler(sampling, stream), limit)
        )
        return number

    def cancel(self, request: int) -> None:
        """Forgets a request and frees its slot; one that is finished or unknown changes nothing."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.number != request)
        for slot, running in enumerate(self._running):
            if running.number == request:
                self._release(slot)
                return

    @torch.inference_mode()
    def step(self) -> list[GeneratedToken]:
        """One token of every running request; waiting ones that find a slot are read and get their first.

        A request whose token says ``finish`` has left its slot. After an exception the engine is not to be used again.
        """
        new = self._admit()
        tokens = self._decode(list(self._running)) if self._running else []
        tokens += self._prefill(new) if new else []
        ended = {token.request for token in tokens if token.finish}
        for slot in reversed(range(len(self._running))):
            if self._running[slot].number in ended:
                self._release(slot)
        return tokens

    def _admit(self) -> list[_ActiveRequest]:
        new: list[_ActiveRequest] = []
        total = 0
        while self._waiting and len(self._running) + len(new) < self.slots:
            total += len(self._waiting[0].ids)
            if new and total > self.prefill_tokens:
                break
            new.append(self._waiting.popleft())
        return new

    def _prefill(self, new: list[_ActiveRequest]) -> list[GeneratedToken]:
        lengths = [len(request.ids) for request in new]
        ids = torch.tensor([token for request in new for token in request.ids], device=self.device)
        docs, attend = self.cache.prompts(lengths, self.device)
        hidden = self.model(ids, docs, attend)
        last = torch.tensor(lengths).cumsum(0) - 1
        logits = self.model.logits(hidden[last.to(self.device)])
        self._running += new
        return self._choose(new, logits)

    def _decode(self, requests: list[_ActiveRequest]) -> list[GeneratedToken]:
        ids = torch.tensor([request.ids[-1] for request in requests], device=self.device)
        docs, attend = self.cache.step(self.device)
        return self._choose(requests, self.model.logits(self.model(ids, docs, attend)))

    def _choose(self, requests: list[_ActiveRequest], logits: Tensor) -> list[GeneratedToken]:
        if plain_greedy([request.sampling for request in requests]):
            chosen = logits.argmax(-1).tolist()  # the device is waited for once, not once a request
            return [self._take(request, token) for request, token in zip(requests, chosen, strict=True)]
        tokens = []
        for request, row in zip(requests, logits, strict=True):
            sampling = request.sampling
            seen = torch.tensor(request.ids if sampling.repetition_penalty != 1.0 else [], dtype=torch.long)
            token = request.sampler.next(penalised(row, seen.to(row.device), sampling.repetition_penalty))
            logprob, top = (None, []) if sampling.logprobs < 0 else report(row, token, sampling.logprobs)
            tokens.append(self._take(request, token, logprob, top))
        return tokens

    def _take(
        self,
        request: _ActiveRequest,
        token: int,
        logprob: float | None = None,
        top: Sequence[tuple[int, float]] = (),
    ) -> GeneratedToken:
        request.ids.append(token)
        finish = (
            "stop"
            if token in request.sampling.eos_ids
            else "length"
            if len(request.ids) >= request.limit
            else ""
        )
        return GeneratedToken(request.number, token, logprob, list(top), finish)

    def _release(self, slot: int) -> None:
        self.cache.release(slot)
        self._running[slot] = self._running[-1]
        self._running.pop()


def check_prompt(
    prompt: Sequence[int], max_tokens: int, vocab_size: int | None, name: str = "the prompt"
) -> None:
    """Raises:
    UserError: the prompt is empty, leaves no room for an answer, or holds ids the model does not know.
    """
    if not prompt:
        raise UserError(f"{name} is empty", expected="at least one token")
    if len(prompt) >= max_tokens:
        raise UserError(
            f"{name} has {len(prompt)} tokens", expected=f"at most {max_tokens - 1}, so that one can follow"
        )
    wrong = [token for token in prompt if token < 0 or (vocab_size is not None and token >= vocab_size)]
    if wrong:
        raise UserError(f"{name} holds id {wrong[0]}", expected=f"ids from 0 to {(vocab_size or 0) - 1}")
