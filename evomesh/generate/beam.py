"""Beam search: follow several continuations of a prompt at once, and answer with the best finished ones.

The rules are those of ``transformers.generate`` with its default ``early_stopping=False``.
Shapes: P prompts, R running beams, V vocabulary, K candidates.
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
from evomesh.generate.sample import candidates, penalize
from evomesh.models.language_model import LanguageModel


@dataclass
class _Beam:
    """``score``: summed log-probability; of a finished beam, after the length penalty."""

    ids: list[int]  # prompt and answer
    score: float = 0.0


@dataclass
class _BeamCandidate:
    """A running beam with one more token. ``parent``: index of the running beam."""

    parent: int
    token: int
    score: float


@dataclass
class _BeamSearch:
    """The search of one prompt.

    Attributes:
        max_total_length: of prompt and answer together.
        running: up to ``num_beams`` beams that can still grow, best first.
        finished: up to ``num_beams`` answers, best first.
    """

    sampling: SamplingParams
    prompt_length: int
    max_total_length: int
    random: np.random.Generator
    running: list[_Beam]
    finished: list[_Beam] = field(default_factory=list)

    def advance(self, logits: Tensor) -> list[int]:
        """Extend every beam by one token; return the index of the former beam that each running one extends.

        Args:
            logits: [R, V] of the running beams.
        """
        num_beams = self.sampling.num_beams
        eos_ids = self.sampling.eos_ids
        length = len(self.running[0].ids) + 1

        # 1. Enough candidates that `num_beams` of them can grow even if every end token is among the best.
        found = self._candidates(logits, max(2, 1 + len(eos_ids)) * num_beams)

        # 2. A candidate that ends is an answer if it ranks among the best; the others are there to grow.
        growing: list[tuple[int, _Beam]] = []  # (parent, beam)
        for rank, candidate in enumerate(found):
            beam = _Beam([*self.running[candidate.parent].ids, candidate.token], candidate.score)
            ends = candidate.token in eos_ids or length >= self.max_total_length
            if not ends:
                growing.append((candidate.parent, beam))
            elif rank < num_beams:
                self.finished.append(_Beam(beam.ids, self._final_score(beam.score, length)))

        # 3. Keep the best of each kind.
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[:num_beams]
        growing = sorted(growing, key=lambda item: -item[1].score)[:num_beams]
        self.running = [beam for _, beam in growing]

        # 4. Stop once the best running beam, if it ended here, would not beat the worst answer. With a positive
        #    length penalty it could still improve; transformers stops all the same.
        best_possible = self._final_score(self.running[0].score, length) if self.running else -math.inf
        if len(self.finished) == num_beams and best_possible <= self.finished[-1].score:
            self.running = []
            return []
        return [parent for parent, _ in growing]

    def _final_score(self, score: float, length: int) -> float:
        return score / float((length - self.prompt_length) ** self.sampling.length_penalty)

    def _candidates(self, logits: Tensor, count: int) -> list[_BeamCandidate]:
        """Return the ``count`` best extensions of the running beams, or as many sampled ones."""
        logprobs = logits.log_softmax(-1)
        vocab_size = logprobs.shape[1]
        penalty = self.sampling.repetition_penalty
        if penalty != 1.0:
            for row, beam in enumerate(self.running):
                seen = torch.tensor(beam.ids, device=logprobs.device)
                logprobs[row] = penalize(logprobs[row], seen, penalty)
        if not self.sampling.greedy:
            logprobs = self._without_unlikely(logprobs.cpu().double())
        scores = torch.tensor(
            [beam.score for beam in self.running], dtype=logprobs.dtype, device=logprobs.device
        )
        summed = (logprobs + scores[:, None]).flatten()  # [R * V]

        # The largest of perturbed log-probabilities are a sample without replacement (Kool et al., 1903.06059).
        ranking = summed
        if not self.sampling.greedy:
            ranking = summed + torch.from_numpy(self.random.gumbel(size=len(summed)))
        best = ranking.topk(min(count, len(ranking))).indices  # [K]
        best = best[summed[best].isfinite()]
        return [
            _BeamCandidate(index // vocab_size, index % vocab_size, score)
            for index, score in zip(best.tolist(), summed[best].tolist(), strict=True)
        ]

    def _without_unlikely(self, logprobs: Tensor) -> Tensor:
        """[R, V] -> [R, V], with -inf for the tokens that top-k, top-p or min-p drops."""
        remaining = torch.full_like(logprobs, -math.inf)
        for row, values in enumerate(logprobs):
            ids, kept = candidates(values, self.sampling, keep=len(self.sampling.eos_ids) + 1)
            remaining[row, ids] = kept
        return remaining


@torch.inference_mode()
def beam_search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    context_length: int,
    numbers: Sequence[int],
) -> list[list[list[int]]]:
    """Return the new token ids as [prompt][answer]: the ``num_return_sequences`` best answers, best first.

    All prompts are searched at the same time, with ``num_beams`` sequences each.

    Args:
        prompts: token ids, checked.
        context_length: maximum number of tokens of a prompt and its answer.
        numbers: number of each prompt; prompt number p samples, if at all, from the random stream (seed, p).
    """
    device = next(model.parameters()).device
    searches = _start_searches(prompts, sampling, context_length, numbers)
    cache = KeyValueCache(len(prompts) * sampling.num_beams, context_length)

    # 1. The prompts: one beam each, whose last token gives the first logits [P, V].
    lengths = [len(prompt) for prompt in prompts]
    bounds, attend = cache.prefill(lengths, device)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    last_tokens = torch.tensor(lengths, device=device).cumsum(0) - 1
    logits = model.logits(model(ids, bounds, attend)[last_tokens])

    # 2. One token of every running beam at a time, until no search has one left.
    active = searches
    while True:
        parents = _advance_all(active, logits)
        active = [search for search in active if search.running]
        if not active:
            break
        cache.reorder(parents)
        bounds, attend = cache.decode_step(device)
        new_tokens = [beam.ids[-1] for search in active for beam in search.running]
        logits = model.logits(model(torch.tensor(new_tokens, device=device), bounds, attend))

    # 3. The best answers, without the prompt.
    count = sampling.num_return_sequences
    return [[beam.ids[search.prompt_length :] for beam in search.finished[:count]] for search in searches]


def _start_searches(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams, context_length: int, numbers: Sequence[int]
) -> list[_BeamSearch]:
    return [
        _BeamSearch(
            sampling,
            len(prompt),
            sampling.max_total_length(len(prompt), context_length),
            np.random.default_rng((sampling.seed, number)),
            [_Beam(list(prompt))],
        )
        for number, prompt in zip(numbers, prompts, strict=True)
    ]


def _advance_all(searches: Sequence[_BeamSearch], logits: Tensor) -> list[int]:
    """Advance each search by its rows of the logits [sum of R, V]; return the row that each running beam extends."""
    parents: list[int] = []
    first_row = 0
    for search in searches:
        end_row = first_row + len(search.running)
        parents += [first_row + parent for parent in search.advance(logits[first_row:end_row])]
        first_row = end_row
    return parents
