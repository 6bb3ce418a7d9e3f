"""Beam search: several continuations of a prompt side by side, and the best finished ones as answers.

The rules are those of ``transformers.generate`` with its default ``early_stopping=False``.
Shapes: B prompts, R running beams, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evomesh.generate.cache import KeyValueCache
from evomesh.generate.options import SamplingParams
from evomesh.generate.sample import candidates, penalised
from evomesh.models.language_model import LanguageModel


@dataclass
class _Beam:
    ids: list[int]  # prompt and answer
    score: float = 0.0


@dataclass
class _BeamSearch:
    """One prompt's search. ``running`` holds up to ``num_beams`` beams, best first; ``finished`` as many answers."""

    sampling: SamplingParams
    prompt: int
    limit: int
    draws: np.random.Generator
    running: list[_Beam]
    finished: list[_Beam] = field(default_factory=list)

    def step(self, logits: Tensor) -> list[int]:
        """Goes on from logits [R, V] of the running beams; returns which of them each of the new ones continues."""
        beams, eos = self.sampling.num_beams, self.sampling.eos_ids
        values, rows, tokens = self._candidates(logits, max(2, 1 + len(eos)) * beams)
        length = len(self.running[0].ids) + 1
        going, parents = [], []
        for rank, (value, row, token) in enumerate(zip(values, rows, tokens, strict=True)):
            beam = _Beam([*self.running[row].ids, token], value)
            if token not in eos and length < self.limit:
                going.append(beam)
                parents.append(row)
            elif rank < beams:  # a candidate behind these is kept only for the beams to go on with
                self.finished.append(_Beam(beam.ids, self._finished(value, length)))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[:beams]
        best = sorted(range(len(going)), key=lambda i: -going[i].score)[:beams]
        self.running = [going[i] for i in best]
        # What the best running one would be worth, did it end here. It may still get better with a positive length
        # penalty; transformers stops all the same.
        promise = self._finished(self.running[0].score, length) if self.running else -math.inf
        if len(self.finished) == beams and promise <= self.finished[-1].score:
            self.running = []
        return [parents[i] for i in best[: len(self.running)]]

    def _finished(self, score: float, length: int) -> float:
        return score / float((length - self.prompt) ** self.sampling.length_penalty)

    def _candidates(self, logits: Tensor, count: int) -> tuple[list[float], list[int], list[int]]:
        """Summed log-probabilities, rows and tokens of the K best continuations, or of K drawn ones."""
        logprobs = logits.log_softmax(-1)
        vocab = logprobs.shape[1]
        if self.sampling.repetition_penalty != 1.0:
            for row, beam in enumerate(self.running):
                seen = torch.tensor(beam.ids, device=logprobs.device)
                logprobs[row] = penalised(logprobs[row], seen, self.sampling.repetition_penalty)
        if not self.sampling.greedy:
            logprobs = self._cut(logprobs.cpu().double())
        scores = torch.tensor(
            [beam.score for beam in self.running], dtype=logprobs.dtype, device=logprobs.device
        )
        summed = (logprobs + scores[:, None]).flatten()
        order = summed
        if not self.sampling.greedy:
            # The largest of perturbed log-probabilities are a draw without replacement (Kool et al., 1903.06059).
            order = summed + torch.from_numpy(self.draws.gumbel(size=len(summed)))
        places = order.topk(min(count, len(order))).indices
        values = summed[places]
        places, values = places[values.isfinite()], values[values.isfinite()]
        return values.tolist(), (places // vocab).tolist(), (places % vocab).tolist()

    def _cut(self, logprobs: Tensor) -> Tensor:
        """[R, V] -> [R, V], with -inf where top-k, top-p or min-p leave a token out."""
        left = torch.full_like(logprobs, -math.inf)
        for row, values in enumerate(logprobs):
            ids, kept = candidates(values, self.sampling, keep=len(self.sampling.eos_ids) + 1)
            left[row, ids] = kept
        return left


@torch.inference_mode()
def beam_search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    room: int,
    numbers: Sequence[int],
) -> list[list[list[int]]]:
    """[prompt][answer] -> new token ids, best answer first, ``num_return_sequences`` of them.

    All prompts are searched at the same time, ``num_beams`` sequences each.

    Args:
        prompts: token ids, checked.
        room: most tokens of a prompt and its answer.
        numbers: of the prompts: number p draws, if at all, from the stream (seed, p).
    """
    device = next(model.parameters()).device
    searches = [
        _BeamSearch(
            sampling,
            len(prompt),
            sampling.limit(len(prompt), room),
            np.random.default_rng((sampling.seed, number)),
            [_Beam(list(prompt))],
        )
        for number, prompt in zip(numbers, prompts, strict=True)
    ]
    cache = KeyValueCache(len(prompts) * sampling.num_beams, room)
    lengths = [len(prompt) for prompt in prompts]
    docs, attend = cache.prompts(lengths, device)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    logits = model.logits(model(ids, docs, attend)[last])
    active = searches
    while True:
        rows, start = [], 0
        for search in active:
            held = len(search.running)
            rows += [start + parent for parent in search.step(logits[start : start + held])]
            start += held
        active = [search for search in active if search.running]
        if not active:
            break
        cache.take(rows)
        docs, attend = cache.step(device)
        ids = torch.tensor([beam.ids[-1] for search in active for beam in search.running], device=device)
        logits = model.logits(model(ids, docs, attend))
    answers = sampling.num_return_sequences
    return [[beam.ids[search.prompt :] for beam in search.finished[:answers]] for search in searches]
