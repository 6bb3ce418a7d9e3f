"""Continuous batching: requests join and leave between steps, and each step gives one token of every running one.

Shapes: B requests, T packed tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from evomesh.errors import UserError
from evomesh.generate.cache import KeyValueCache
from evomesh.generate.options import PagedMode, SamplingParams
from evomesh.generate.paged_cache import PagedCache
from evomesh.generate.paged_decoding import (
    PagedDecoding,
    RowDecoding,
    choose_decoding,
)
from evomesh.generate.sample import (
    TokenLogprob,
    TokenSampler,
    argmax_suffices,
    penalize,
    top_logprobs,
)
from evomesh.generate.top_logits import choose_tokens
from evomesh.models.language_model import LanguageModel, short_length

LOGIT_ROWS = 512  # rows of V logits of a prompt in memory at a time


@dataclass(frozen=True)
class TokenScore:
    """A token of a prompt with its log-probability, as in ``GeneratedToken``; None for the first token."""

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class GeneratedToken:
    """One token of one request.

    Attributes:
        logprob: of ``id`` under the model's own distribution, before penalty and temperature; None unless requested.
        top: (id, log-probability) of the `SamplingParams.logprobs` most probable tokens.
        prompt_scores: scores of all tokens of the prompt, with the first token of the answer, if
            `SamplingParams.score_prompt` is set.
        finish: "stop" for an id that ends the answer, "length" for the last one that fits, else "".
    """

    request: int
    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    finish: str = ""
    prompt_scores: list[TokenScore] = field(default_factory=list)


@dataclass
class _ActiveRequest:
    number: int
    ids: list[int]  # prompt and answer
    sampling: SamplingParams
    sampler: TokenSampler
    max_total_length: int
    is_read: bool = False  # the prompt was, and has its scores

    def append(
        self,
        token: int,
        logprob: float | None = None,
        top: Sequence[tuple[int, float]] = (),
    ) -> GeneratedToken:
        """Add a token to the answer and return it, with the reason if it is the last one."""
        self.ids.append(token)
        finish = ""
        if token in self.sampling.eos_ids:
            finish = "stop"
        elif len(self.ids) >= self.max_total_length:
            finish = "length"
        return GeneratedToken(self.number, token, logprob, list(top), finish)


class GenerationEngine:
    """A model, its key/value cache, and the requests in progress. Uses no threads: the caller drives ``step``.

    The tokens of a request do not depend on what else is in the batch, up to the
    rounding of matrix products.

    Args:
        model: in evaluation mode; the engine computes on the device of its parameters.
        slots: requests that run at the same time; further ones wait.
        context_length: maximum number of tokens of one request, prompt and answer together. From the first step on,
            keys and values of slots * context_length tokens are held in memory.
        vocab_size: prompts with ids outside 0 .. vocab_size - 1 are rejected; None: that of the model's config.
        paged: keep keys and values in pages (``paged_decoding.py``): "off", which is the default until a GPU has run
            ``tests/gpu/test_paged.py``; "auto": if torch has a kernel for them here; "on": or refuse.
        pages: of the pool; None: as many as hold the context length of every slot. With fewer, requests wait for them.
        prefill_tokens: prompts that are read in one step have at most this many tokens together (a longer prompt is
            read alone), so that running requests do not wait long for them.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int,
        context_length: int,
        vocab_size: int | None = None,
        prefill_tokens: int = 8192,
        paged: PagedMode = "off",
        pages: int | None = None,
    ) -> None:
        if slots < 1 or context_length < 2:
            raise UserError(
                f"slots={slots}, context_length={context_length}",
                expected="at least 1 slot of 2 tokens",
                code="EVO-GEN-001",
            )
        self.model = model
        self.slots = slots
        self.context_length = context_length
        self.vocab_size = vocab_size or getattr(
            getattr(model, "config", None), "vocab_size", None
        )
        self.prefill_tokens = prefill_tokens
        self.device = next(model.parameters()).device
        self.decoding: RowDecoding | PagedDecoding = choose_decoding(
            model,
            slots,
            context_length,
            paged,
            pages,
        )
        self._short_length = short_length(model)
        self._running: list[_ActiveRequest] = []  # by slot
        self._waiting: deque[_ActiveRequest] = deque()
        self._next_number = 0

    @property
    def cache(self) -> KeyValueCache | PagedCache:
        return self.decoding.cache

    @property
    def active(self) -> int:
        """The number of unfinished requests, waiting ones included."""
        return len(self._running) + len(self._waiting)

    @property
    def waiting(self) -> int:
        """The number of requests that have no slot yet."""
        return len(self._waiting)

    def add(
        self, prompt: Sequence[int], sampling: SamplingParams, stream: tuple[int, int]
    ) -> int:
        """Queue a request and return its number, which its tokens carry.

        Args:
            prompt: token ids.
            sampling: ``num_beams`` and ``num_return_sequences`` of 1: add one request per answer; for beams, see
                ``beam.py``.
            stream: (seed, request): equal pairs draw equal random numbers.
        Raises:
            UserError: the prompt is empty, leaves no room for an answer, or contains ids that the model does not know.
        """
        check_prompt(prompt, self.context_length, self.vocab_size)
        if sampling.num_beams > 1 or sampling.num_return_sequences > 1:
            raise UserError(
                f"num_beams={sampling.num_beams}, num_return_sequences={sampling.num_return_sequences}",
                expected="1 and 1: this engine generates one answer per request",
                code="EVO-GEN-001",
            )
        number = self._next_number
        self._next_number += 1
        max_total_length = sampling.max_total_length(len(prompt), self.context_length)
        sampler = TokenSampler(sampling, stream)
        request = _ActiveRequest(
            number, list(prompt), sampling, sampler, max_total_length
        )
        self._waiting.append(request)
        return number

    def cancel(self, number: int) -> None:
        """Drop a request and free its slot; a finished or unknown one is ignored."""
        self._waiting = deque(
            request for request in self._waiting if request.number != number
        )
        for slot, request in enumerate(self._running):
            if request.number == number:
                self._release(slot)
                return

    @torch.inference_mode()
    def step(self) -> list[GeneratedToken]:
        """Generate one token of every running request; waiting ones that get a slot are read and get their first.

        A request whose token has a ``finish`` has left its slot. After an exception,
        discard the engine.
        """
        self._queue_outgrown()
        self._queue_crowded()
        admitted = self._admit()
        tokens: list[GeneratedToken] = []
        if self._running:
            tokens += self._decode(list(self._running))
        if admitted:
            tokens += self._prefill(admitted)

        # From the last slot to the first, because the last request moves into a slot
        # that is released.
        finished = {token.request for token in tokens if token.finish}
        for slot in reversed(range(len(self._running))):
            number = self._running[slot].number
            if number in finished:
                self._release(slot)
        return tokens

    def _queue_outgrown(self) -> None:
        """Take the slots of requests that grow beyond ``short_length`` now; first in the queue, they are read again."""
        for slot in reversed(range(len(self._running))):
            request = self._running[slot]
            # The last token is not in the cache yet.
            if len(request.ids) - 1 == self._short_length:
                self._release(slot)
                self._waiting.appendleft(request)

    def _queue_crowded(self) -> None:
        """Take the pages of the newest requests until all others have room; first in the queue, they are read again."""
        while self.cache.shortage():
            numbers = [request.number for request in self._running]
            newest = numbers.index(max(numbers))
            request = self._running[newest]
            self._release(newest)
            self._waiting.appendleft(request)

    def _admit(self) -> list[_ActiveRequest]:
        """Take waiting requests, as far as slots and ``prefill_tokens`` allow."""
        admitted: list[_ActiveRequest] = []
        total_tokens = 0
        free_slots = self.slots - len(self._running)
        while self._waiting and len(admitted) < free_slots:
            next_request = self._waiting[0]
            total_tokens += len(next_request.ids)
            if admitted and total_tokens > self.prefill_tokens:
                break
            lengths = [len(request.ids) for request in (*admitted, next_request)]
            if not self.cache.can_admit(lengths):
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _prefill(self, admitted: list[_ActiveRequest]) -> list[GeneratedToken]:
        """Read the tokens of requests without a slot, of most the prompt, and choose their next ones."""
        hidden_of_prompts = self._read_prompts(admitted)
        prompt_scores = self._score_prompts(admitted, hidden_of_prompts)
        # The last token of each prompt predicts the first one of its answer.
        last_states = [states[-1] for states in hidden_of_prompts]
        predicting = torch.stack(last_states)  # [B, D]
        logits = self.model.logits(predicting)  # [B, V]
        self._running += admitted
        tokens = self._choose_tokens(admitted, logits)
        # A prompt's scores go out with the first token.
        scored_tokens = []
        pairs = zip(tokens, prompt_scores, strict=True)
        for token, scores in pairs:
            scored = replace(token, prompt_scores=scores)
            scored_tokens.append(scored)
        return scored_tokens

    def _read_prompts(self, admitted: Sequence[_ActiveRequest]) -> Sequence[Tensor]:
        """Fill the cache with the tokens of these requests, and return the hidden states [length, D] of each."""
        # Packed without padding: lengths 3 and 2 give T = 5 tokens with sequence bounds
        # 0, 3, 5.
        lengths: list[int] = []
        packed: list[int] = []
        for request in admitted:
            prompt = request.ids
            length = len(prompt)
            lengths.append(length)
            packed += prompt
        device = self.device
        ids = torch.tensor(packed, device=device)
        bounds, attend = self.cache.prefill(lengths, device)
        hidden = self.model(ids, bounds, attend)  # [T, D]
        return torch.split(hidden, lengths)

    def _score_prompts(
        self,
        admitted: Sequence[_ActiveRequest],
        states: Sequence[Tensor],
    ) -> list[list[TokenScore]]:
        """Return the scores of each prompt whose request wants them, and only once: it may be read again later."""
        all_scores: list[list[TokenScore]] = []
        for request, hidden in zip(admitted, states, strict=True):
            scores: list[TokenScore] = []
            if request.sampling.score_prompt and not request.is_read:
                scores = self._score_prompt(request, hidden)
            all_scores.append(scores)
            request.is_read = True
        return all_scores

    def _score_prompt(
        self, request: _ActiveRequest, hidden: Tensor
    ) -> list[TokenScore]:
        """Return the scores of a prompt's tokens; ``hidden`` [length, D] are its hidden states."""
        prompt = request.ids
        top_count = max(request.sampling.logprobs, 0)
        # The state of position t predicts token t + 1. So nothing predicts the first token, and the last state is left
        # over: it predicts the answer.
        scores = [TokenScore(prompt[0])]
        # In chunks, because the logits [length, V] of a long prompt may not fit into
        # memory.
        predicted = prompt[1:]
        for start in range(0, len(predicted), LOGIT_ROWS):
            targets = predicted[start : start + LOGIT_ROWS]
            states = hidden[start : start + len(targets)]
            logits = self.model.logits(states)
            logprobs = logits.log_softmax(-1)
            scores += _target_scores(logprobs, targets, top_count)
        return scores

    def _decode(self, requests: list[_ActiveRequest]) -> list[GeneratedToken]:
        """Choose the next token of requests whose other tokens are in the cache."""
        last_tokens = [request.ids[-1] for request in requests]
        logits = self.decoding.next_logits(last_tokens)
        return self._choose_tokens(requests, logits)

    def _choose_tokens(
        self, requests: list[_ActiveRequest], logits: Tensor
    ) -> list[GeneratedToken]:
        """Choose the next token of each request by its row of the logits [B, V]."""
        if argmax_suffices([request.sampling for request in requests]):
            chosen = logits.argmax(
                -1
            ).tolist()  # waits for the device once, not once per request
            return [
                request.append(token)
                for request, token in zip(requests, chosen, strict=True)
            ]
        penalties = {request.sampling.repetition_penalty for request in requests}
        penalized = logits
        if penalties != {1.0}:
            penalized = _penalized(requests, logits)
        samplers = [request.sampler for request in requests]
        chosen = choose_tokens(samplers, penalized)
        logprobs = _logprobs(requests, logits, chosen)
        return [
            request.append(token, *logprobs.get(row, ()))
            for row, (request, token) in enumerate(zip(requests, chosen, strict=True))
        ]

    def _release(self, slot: int) -> None:
        # As in the cache, the last request in use moves into the free slot.
        self.cache.release(slot)
        self._running[slot] = self._running[-1]
        self._running.pop()


def _penalized(
    requests: Sequence[_ActiveRequest],
    logits: Tensor,
) -> Tensor:
    """Return logits [B, V] in which the tokens that a request already has are lowered by its penalty."""
    rows = []
    for request, row in zip(requests, logits, strict=True):
        seen = torch.tensor(request.ids)
        seen = seen.to(
            logits.device,
            non_blocking=True,
        )
        penalty = request.sampling.repetition_penalty
        penalized = penalize(row, seen, penalty)
        rows.append(penalized)
    return torch.stack(rows)


def _logprobs(
    requests: Sequence[_ActiveRequest],
    logits: Tensor,
    chosen: Sequence[int],
) -> dict[int, tuple[float, list[TokenLogprob]]]:
    """Return what ``GeneratedToken`` says of the rows whose requests want log-probabilities.

    They are the model's own, without the penalty.
    """
    counts: dict[int, int] = {}
    for row, request in enumerate(requests):
        count = request.sampling.logprobs
        if count >= 0:
            counts[row] = count
    if not counts:
        return {}
    wanted = [logits[row] for row in counts]
    tokens = [chosen[row] for row in counts]
    largest_count = max(counts.values())
    found = top_logprobs(
        torch.stack(wanted),
        tokens,
        largest_count,
    )
    answers = {}
    pairs = zip(counts.items(), found, strict=True)
    for (row, count), (logprob, top) in pairs:
        answers[row] = (logprob, top[:count])
    return answers


def _target_scores(
    logprobs: Tensor, targets: list[int], top_count: int
) -> list[TokenScore]:
    """Return the score of each target under its row of ``logprobs`` [rows, V], with the ``top_count`` best tokens."""
    columns = torch.tensor(targets, device=logprobs.device).unsqueeze(1)
    of_targets = logprobs.gather(1, columns).squeeze(1)
    best = logprobs.topk(min(top_count, logprobs.shape[1]))
    scores = []
    for target, logprob, ids, values in zip(
        targets,
        of_targets.tolist(),
        best.indices.tolist(),
        best.values.tolist(),
        strict=True,
    ):
        top = list(zip(ids, values, strict=True))
        scores.append(TokenScore(target, logprob, top))
    return scores


def check_eos_ids(sampling: SamplingParams, vocab_size: int | None) -> None:
    """Refuse ids that should end an answer and that the model can never generate.

    Raises:
        UserError: one is outside the vocabulary.
    """
    for token in sampling.eos_ids:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            raise UserError(
                f"the end-of-answer id {token} is outside the vocabulary: no answer would end with it",
                expected=f"ids from 0 to {(vocab_size or 0) - 1}",
                fix="correct --eos-id, generation.eos_id or generation.additional_eos_token_list",
                code="EVO-TOKEN-004",
            )


def check_prompt(
    prompt: Sequence[int],
    context_length: int,
    vocab_size: int | None,
    name: str = "the prompt",
) -> None:
    """Reject a prompt that cannot be completed.

    Raises:
        UserError: the prompt is empty, leaves no room for an answer, or contains ids that the model does not know.
    """
    if not prompt:
        raise UserError(
            f"{name} is empty", expected="at least one token", code="EVO-GEN-002"
        )
    if len(prompt) >= context_length:
        raise UserError(
            f"{name} has {len(prompt)} tokens",
            expected=f"at most {context_length - 1}, which leaves room for one more",
            code="EVO-GEN-002",
        )
    for token in prompt:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            raise UserError(
                f"{name} contains id {token}",
                expected=f"ids from 0 to {(vocab_size or 0) - 1}",
                code="EVO-GEN-002",
            )
