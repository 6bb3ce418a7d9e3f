"""Beam search: follow several continuations of a prompt at once, and answer with the best finished ones.

The rules are those of ``transformers.generate`` with its default ``early_stopping=False``.
Shapes: P prompts, R running beams, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from evomesh.generate.cache import KeyValueCache
from evomesh.generate.options import SamplingParams
from evomesh.generate.sample import candidates, penalize
from evomesh.models.language_model import LanguageModel, short_length


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


_Scored = TypeVar("_Scored", _Beam, _BeamCandidate)


def _best(scored: Iterable[_Scored], count: int) -> list[_Scored]:
    """Return the ``count`` with the highest scores, best first; of equal scores the earlier one first."""
    ranked = sorted(scored, key=lambda item: -item.score)
    return ranked[:count]


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
        sampling = self.sampling
        num_beams = sampling.num_beams
        first_beam = self.running[0]  # all are of the same length
        length = len(first_beam.ids) + 1

        # 1. Enough candidates that `num_beams` of them can grow even if every end token is among the best.
        per_beam = max(2, 1 + len(sampling.eos_ids))
        num_candidates = per_beam * num_beams
        found = self._candidates(logits, num_candidates)

        # 2. A candidate that ends is an answer if it ranks among the best; the others are there to grow.
        growing = self._finish_ended(found, length)

        # 3. Keep the best of each kind.
        self.finished = _best(self.finished, num_beams)
        growing = _best(growing, num_beams)
        if self._cannot_improve(growing, length):
            self.running = []
            return []
        parents = [candidate.parent for candidate in growing]
        self.running = [self._extend(candidate) for candidate in growing]
        return parents

    def _finish(self, candidate: _BeamCandidate, length: int) -> None:
        """Add the answer that ends with a candidate."""
        answer = self._extend(candidate)
        answer.score = self._final_score(candidate.score, length)
        self.finished.append(answer)

    def _cannot_improve(self, growing: list[_BeamCandidate], length: int) -> bool:
        """Return whether the best candidate, if it ended here, would not beat the worst answer.

        With a positive length penalty it could still improve; transformers stops all the
        same.
        """
        if len(self.finished) < self.sampling.num_beams:
            return False
        if not growing:
            return True
        best_possible = self._final_score(growing[0].score, length)
        return best_possible <= self.finished[-1].score

    def _finish_ended(
        self, found: Sequence[_BeamCandidate], length: int
    ) -> list[_BeamCandidate]:
        """Make answers of the ended candidates among the ``num_beams`` best, and return all that can grow."""
        at_maximum = length >= self.max_total_length
        growing: list[_BeamCandidate] = []
        for rank, candidate in enumerate(found):
            ends = at_maximum or candidate.token in self.sampling.eos_ids
            if not ends:
                growing.append(candidate)
            elif rank < self.sampling.num_beams:
                self._finish(candidate, length)
        return growing

    def _extend(self, candidate: _BeamCandidate) -> _Beam:
        parent = self.running[candidate.parent]
        return _Beam([*parent.ids, candidate.token], candidate.score)

    def best_answers(self) -> list[list[int]]:
        """Return the new token ids of the ``num_return_sequences`` best answers, best first."""
        best = self.finished[: self.sampling.num_return_sequences]
        return [beam.ids[self.prompt_length :] for beam in best]

    def _final_score(self, score: float, length: int) -> float:
        new_tokens = length - self.prompt_length
        return score / float(new_tokens**self.sampling.length_penalty)

    def _candidates(self, logits: Tensor, count: int) -> list[_BeamCandidate]:
        """Return the ``count`` best extensions of the running beams, or as many sampled ones."""
        extended_scores = self._extended_scores(logits)  # [R, V]
        _, vocab_size = extended_scores.shape
        scores = extended_scores.flatten()  # [R * V]

        # 1. The best of them that are possible at all.
        best = self._rank(scores, count)  # [K]
        scores_of_best = scores[best]
        is_possible = scores_of_best.isfinite()
        best = best[is_possible]

        # 2. As beams and tokens: with V = 100, index 203 is token 3 after beam 2.
        found: list[_BeamCandidate] = []
        indices = best.tolist()
        best_scores = scores[best].tolist()
        for index, score in zip(indices, best_scores, strict=True):
            parent, token = divmod(index, vocab_size)
            candidate = _BeamCandidate(parent, token, score)
            found.append(candidate)
        return found

    def _extended_scores(self, logits: Tensor) -> Tensor:
        """Return the score of every running beam with every token after it, [R, V]."""
        logprobs = self._next_logprobs(logits)
        beam_scores = logprobs.new_tensor([beam.score for beam in self.running])
        return logprobs + beam_scores.unsqueeze(1)

    def _rank(self, scores: Tensor, count: int) -> Tensor:
        """Return the indices of the ``count`` largest scores, or of so many sampled by their scores."""
        count = min(count, len(scores))
        if self.sampling.greedy:
            return scores.topk(count).indices
        # The largest of perturbed log-probabilities are a sample without replacement
        # (Kool et al., 1903.06059).
        noise = self.random.gumbel(size=len(scores))
        perturbed = scores + torch.from_numpy(noise)
        return perturbed.topk(count).indices

    def _next_logprobs(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities [R, V] from which next tokens are chosen; when sampling, in float64."""
        sampling = self.sampling
        logprobs = logits.log_softmax(-1)
        penalty = sampling.repetition_penalty
        if penalty != 1.0:
            for beam, row in zip(self.running, logprobs, strict=True):
                seen = torch.tensor(beam.ids, device=row.device)
                penalized = penalize(row, seen, penalty)
                row.copy_(penalized)
        if sampling.greedy:
            return logprobs
        wide = logprobs.cpu().double()
        return self._without_unlikely(wide)

    def _without_unlikely(self, logprobs: Tensor) -> Tensor:
        """[R, V] -> [R, V], with -inf for the tokens that top-k, top-p or min-p drops."""
        remaining = torch.full_like(logprobs, -math.inf)
        for row, values in enumerate(logprobs):
            ids, kept = candidates(
                values, self.sampling, keep=len(self.sampling.eos_ids) + 1
            )
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
    slots = len(prompts) * sampling.num_beams
    cache = KeyValueCache(slots, context_length)

    # 1. The prompts: one beam each, whose last token gives the first logits [P, V].
    logits = _read(model, cache, prompts, device)

    # 2. One token of every running beam at a time, until no search has one left.
    active = searches
    while True:
        parents = _advance_all(active, logits)
        active = [search for search in active if search.running]
        if not active:
            break
        sequences = []
        for search in active:
            sequences += [beam.ids for beam in search.running]
        if _outgrows_short_angles(model, sequences):
            # Their cached keys are rotated by angles of shorter texts.
            cache = KeyValueCache(slots, context_length)
            logits = _read(model, cache, sequences, device)
            continue
        # A beam continues the cache of the one that it comes from.
        cache.reorder(parents)
        bounds, attend = cache.decode_step(device)
        new_tokens = [sequence[-1] for sequence in sequences]
        ids = torch.tensor(new_tokens, device=device)
        hidden = model(ids, bounds, attend)
        logits = model.logits(hidden)

    # 3. The best answers, without the prompt.
    return [search.best_answers() for search in searches]


def _outgrows_short_angles(model: LanguageModel, sequences: list[list[int]]) -> bool:
    """Return whether the newest token of a sequence is the first beyond the length with other angles."""
    limit = short_length(model)
    return any(len(sequence) - 1 == limit for sequence in sequences)


def _read(
    model: LanguageModel,
    cache: KeyValueCache,
    sequences: Sequence[Sequence[int]],
    device: torch.device,
) -> Tensor:
    """Read whole sequences into an empty cache and return the logits of their last tokens, [sequences, V]."""
    lengths: list[int] = []
    packed: list[int] = []
    for sequence in sequences:
        lengths.append(len(sequence))
        packed += sequence
    ids = torch.tensor(packed, device=device)  # [T]
    bounds, attend = cache.prefill(lengths, device)
    hidden = model(ids, bounds, attend)  # [T, D]
    ends = torch.tensor(lengths, device=device).cumsum(0)
    logits: Tensor = model.logits(hidden[ends - 1])
    return logits


def _start_searches(
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    context_length: int,
    numbers: Sequence[int],
) -> list[_BeamSearch]:
    searches = []
    for number, prompt in zip(numbers, prompts, strict=True):
        search = _BeamSearch(
            sampling,
            prompt_length=len(prompt),
            max_total_length=sampling.max_total_length(len(prompt), context_length),
            random=np.random.default_rng((sampling.seed, number)),
            running=[_Beam(list(prompt))],
        )
        searches.append(search)
    return searches


def _advance_all(searches: Sequence[_BeamSearch], logits: Tensor) -> list[int]:
    """Advance each search by its rows of the logits [sum of R, V]; return the row that each running beam extends."""
    parents: list[int] = []
    first_row = 0
    for search in searches:
        end_row = first_row + len(search.running)
        own_parents = search.advance(logits[first_row:end_row])
        parents += [first_row + parent for parent in own_parents]
        first_row = end_row
    return parents
