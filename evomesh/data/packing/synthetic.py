"""Counting sequences for runs without data (``train_folder=None``): InternEvo's random dataset, drawn lazily."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evomesh.data.token_files.lines import TokenArray

SEED = 1999
TRAIN_DOCUMENTS = 1_000_000
VALID_DOCUMENTS = 500
# Names that InternEvo reports; every document is of type 0.
TYPES = ["en", "cn", "code"]


class SyntheticDocuments:
    """Document i is ``[n, r, 0, 1, .. n-1, 0, 1, ..]`` (the count repeated r times), at most ``seq_len`` tokens.

    Args:
        count: number of documents; their n in [1, 30) and r in [10, 200) are drawn at once, their tokens when read.
        seq_len: longest document.
        fixed_length: double r until the document fills ``seq_len``.
        vocab_size: ids are taken modulo this (only a vocabulary smaller than r notices).
    """

    name = "synthetic"
    type_id = 0

    def __init__(
        self,
        count: int,
        seq_len: int,
        *,
        fixed_length: bool = True,
        vocab_size: int = 2**31,
    ) -> None:
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        rng = np.random.RandomState(SEED)
        self.period = rng.randint(1, 30, size=count).astype(np.int64)
        self.repeats = rng.randint(10, 200, size=count).astype(np.int64)
        # The two header tokens, period and repeats, come before the counted ones.
        counted = self.period * self.repeats
        if fixed_length:
            while counted.min() < seq_len:
                is_short = counted < seq_len
                self.repeats[is_short] *= 2
                counted = self.period * self.repeats
        self.lengths: NDArray[np.integer] = np.minimum(2 + counted, seq_len)

    def read(self, documents: NDArray[np.integer]) -> TokenArray:
        """Return the tokens of the given documents, one after the other."""
        return np.concatenate([self._document(int(document)) for document in documents])

    def _document(self, document: int) -> TokenArray:
        period = int(self.period[document])
        repeats = int(self.repeats[document])
        length = max(0, int(self.lengths[document]) - 2)
        counting = np.arange(length) % period
        tokens = np.append([period, repeats], counting)
        return tokens[: self.seq_len] % self.vocab_size
