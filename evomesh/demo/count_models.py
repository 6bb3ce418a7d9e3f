"""Language models made by counting, which a trained model must beat."""

from __future__ import annotations

import json
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
    tokens = []
    targets = []
    for batch in valid.batches(0, 1):
        is_target = batch.labels != IGNORE
        tokens.append(batch.tokens[is_target].numpy())
        targets.append(batch.labels[is_target].numpy())
    return TokenPairs(np.concatenate(tokens), np.concatenate(targets))


def training_pairs(folder: Path) -> TokenPairs:
    """Return the pairs of neighbors in all documents below a folder."""
    previous: list[int] = []
    following: list[int] = []
    for path in sorted(folder.rglob("*.bin")):
        for line in path.read_text().splitlines():
            tokens = json.loads(line)["tokens"]
            previous += tokens[:-1]
            following += tokens[1:]
    return TokenPairs(np.array(previous), np.array(following))


class CountModels:
    """Unigram (add-one) and bigram (interpolated with the unigram) models, fitted by counting."""

    def __init__(self, pairs: TokenPairs, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        counts = np.bincount(pairs.following, minlength=vocab_size) + 1
        self.unigram = counts / counts.sum()
        self.context_counts = np.bincount(pairs.previous, minlength=vocab_size)
        self.pair_ids, self.pair_counts = np.unique(
            self._ids(pairs), return_counts=True
        )

    def _ids(self, pairs: TokenPairs) -> npt.NDArray[Any]:
        """Return one number for each pair."""
        ids: npt.NDArray[Any] = pairs.previous * self.vocab_size + pairs.following
        return ids

    def losses(self, pairs: TokenPairs) -> tuple[float, float]:
        """Return the mean negative log-likelihood, in nats, of the unigram and of the bigram model."""
        # How often each pair occurs in the training data.
        ids = self._ids(pairs)
        last = len(self.pair_ids) - 1
        index = np.searchsorted(self.pair_ids, ids).clip(max=last)
        is_known = self.pair_ids[index] == ids
        pair_counts = np.where(is_known, self.pair_counts[index], 0)

        unigram = self.unigram[pairs.following]
        context_counts = self.context_counts[pairs.previous]
        bigram_losses = []
        for weight in BIGRAM_WEIGHTS:
            smoothed_counts = pair_counts + weight * unigram
            bigram = smoothed_counts / (context_counts + weight)
            bigram_losses.append(-np.log(bigram).mean())
        unigram_loss = -np.log(unigram).mean()
        return float(unigram_loss), float(min(bigram_losses))
