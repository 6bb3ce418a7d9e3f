"""Token frequencies against a tokenizer's vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomesh.data.tokenizer import Tokenizer

MOST_FREQUENT = 50
SENTENCEPIECE_SPACE = "\u2581"
REPLACEMENT = "\ufffd"  # of bytes that are no character
WHITE_SPACE = str.maketrans(
    {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}
)
UNUSED_SHOWN = 200
RANKS = 400  # points of the curve of frequency by rank
UNKNOWN_NAMES = ("<unk>", "[UNK]", "<UNK>", "<|unk|>")
LARGEST_ID = 2**24  # a larger one is not of a vocabulary


class TokenCounts:
    """The number of occurrences of each id.

    Attributes:
        beyond: ids above any vocabulary.
        masked: tokens that are not targets.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(1024, np.int64)
        self.beyond = 0
        self.masked = 0

    def add(self, ids: NDArray[np.int64], masked: int) -> None:
        """Count the ids of a document."""
        self.masked += masked
        is_known = ids < LARGEST_ID
        known = ids[is_known]
        self.beyond += len(ids) - len(known)
        if not len(known):
            return
        # Of a short document only its own ids are touched, not the whole vocabulary.
        values, times = np.unique(known, return_counts=True)
        largest = int(values[-1])
        self._make_room(largest)
        self.counts[values] += times

    def _make_room(self, largest: int) -> None:
        size = len(self.counts)
        while size <= largest:
            size *= 2
        added = np.zeros(size - len(self.counts), np.int64)
        if len(added):
            self.counts = np.concatenate([self.counts, added])

    def figures(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Return counts, the most frequent ids and the curve; with a tokenizer also what of it is unused."""
        counted = int(self.counts.sum())
        total = counted + self.beyond
        distinct = np.count_nonzero(self.counts)
        figures: dict[str, Any] = {
            "total": total,
            "distinct": int(distinct),
            "masked": self.masked / max(1, total),
            "top": self._most_frequent(tokenizer, total),
            "curve": self._curve(),
        }
        if tokenizer is not None:
            figures |= self._against(tokenizer, total)
        return figures

    def _most_frequent(
        self, tokenizer: Tokenizer | None, total: int
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        order = np.argsort(-self.counts, kind="stable")
        for token in order[:MOST_FREQUENT].tolist():
            count = int(self.counts[token])
            if not count:
                break
            share = count / total
            row = {"id": token, "count": count, "share": share}
            if tokenizer is not None:
                row["name"] = _readable_name(tokenizer, token)
            rows.append(row)
        return rows

    def _curve(self) -> dict[str, list[int]]:
        """Return the counts of ranks that are evenly spaced on a logarithmic axis."""
        used = self.counts[self.counts > 0]
        ranks = np.zeros(0, np.int64)
        if len(used):
            spaced = np.geomspace(1, len(used), RANKS)
            rounded = np.round(spaced).astype(np.int64)
            ranks = np.unique(rounded)
        ascending = np.sort(used)
        places = len(used) - ranks
        counts = ascending[places]
        return {
            "rank": ranks.tolist(),
            "count": counts.tolist(),
        }

    def _against(self, tokenizer: Tokenizer, total: int) -> dict[str, Any]:
        size = tokenizer.vocab_size
        counts = np.zeros(size, np.int64)
        inside = self.counts[:size]
        counts[: len(inside)] = inside
        unused = np.flatnonzero(counts == 0)
        shown = [_readable_name(tokenizer, token) for token in unused[:UNUSED_SHOWN]]
        outside = int(self.counts[size:].sum()) + self.beyond
        figures = {
            "vocab_size": size,
            "unused": len(unused),
            "unused_shown": shown,
            "outside": outside,
        }
        unknown = _unknown_id(tokenizer)
        if unknown is not None:
            figures["unknown"] = int(counts[unknown]) / max(1, total)
        return figures


def _readable_name(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token with signs for white space, or its name where it has no whole characters.

    A byte-level BPE names a token by signs for its bytes, such as ``çļĦ`` for 的.
    """
    name = tokenizer.token_name(token)
    if name.startswith(SENTENCEPIECE_SPACE):
        return name  # readable, and without it the space would be lost
    text = tokenizer.decode([token])
    is_whole = text != "" and REPLACEMENT not in text
    return text.translate(WHITE_SPACE) if is_whole else name


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that stands for what the tokenizer cannot encode; None if it has none."""
    names = (tokenizer.special_tokens.get("unk_token", ""), *UNKNOWN_NAMES)
    for name in names:
        token = tokenizer.token_id(name) if name else None
        if token is not None:
            return token
    return None
