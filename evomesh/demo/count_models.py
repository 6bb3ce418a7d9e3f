"""Language models made by counting, which a trained model must beat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from evomesh.config.schema import IGNORE
from evomesh.data.build import ValidationSet

# Tried for the interpolation with the unigram.
BIGRAM_WEIGHTS = (1, 3, 10, 30, 100, 300, 1000)


class TokenPairs(NamedTuple):
    """Tokens and the token that follows each of them."""

    previous: npt.NDArray[Any]
    following: npt.NDArray[Any]


def held_out_pairs(valid: ValidationSet) -> TokenPairs:
    """Return the inputs and targets of a validation set."""
    inputs = []
    targets = []
    for batch in valid.batches(0, 1):
        is_target = batch.labels != IGNORE
        inputs.append(batch.tokens[is_target].numpy())
        targets.append(batch.labels[is_target].numpy())
    previous = np.concatenate(inputs)
    following = np.concatenate(targets)
    return TokenPairs(previous, following)


def training_pairs(folder: Path) -> TokenPairs:
    """Return the pairs of neighbors in all documents below a folder."""
    previous: list[int] = []
    following: list[int] = []
    for tokens in _documents(folder):
        previous += tokens[:-1]
        following += tokens[1:]
    return TokenPairs(np.array(previous), np.array(following))


def _documents(folder: Path) -> Iterator[list[int]]:
    """Yield the tokens of each document in the token files below a folder."""
    for path in sorted(folder.rglob("*.bin")):
        text = path.read_text()
        for line in text.splitlines():
            yield json.loads(line)["tokens"]


class CountModels:
    """Unigram (add-one) and bigram (interpolated with the unigram) models, fitted by counting."""

    def __init__(self, pairs: TokenPairs, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        counts = np.bincount(pairs.following, minlength=vocab_size) + 1
        self.unigram = counts / counts.sum()
        self.context_counts = np.bincount(pairs.previous, minlength=vocab_size)
        ids = self._ids(pairs)
        self.pair_ids, self.pair_counts = np.unique(ids, return_counts=True)

    def _ids(self, pairs: TokenPairs) -> npt.NDArray[Any]:
        """Return one number for each pair."""
        ids: npt.NDArray[Any] = pairs.previous * self.vocab_size + pairs.following
        return ids

    def losses(self, pairs: TokenPairs) -> tuple[float, float]:
        """Return the mean negative log-likelihood, in nats, of the unigram and of the bigram model."""
        unigram = self.unigram[pairs.following]
        context_counts = self.context_counts[pairs.previous]
        pair_counts = self._counts_of(pairs)
        bigram_losses = []
        for weight in BIGRAM_WEIGHTS:
            smoothed_counts = pair_counts + weight * unigram
            bigram = smoothed_counts / (context_counts + weight)
            loss = _mean_loss(bigram)
            bigram_losses.append(loss)
        return _mean_loss(unigram), min(bigram_losses)

    def _counts_of(self, pairs: TokenPairs) -> npt.NDArray[Any]:
        """Return how often each pair occurs in the training data."""
        ids = self._ids(pairs)
        last = len(self.pair_ids) - 1
        index = np.searchsorted(self.pair_ids, ids).clip(max=last)
        is_known = self.pair_ids[index] == ids
        return np.where(is_known, self.pair_counts[index], 0)


def _mean_loss(probabilities: npt.NDArray[Any]) -> float:
    """Return the mean negative log-likelihood, in nats."""
    return float(-np.log(probabilities).mean())
