"""Cutting documents into packs of equal length, by the documents' rules.

A file (or, with ``remainder="carry"``, all files one after the other) is one stream of tokens: its documents in the
order of NumPy's ``RandomState(1024)`` shuffle, the same in every epoch. Pack ``k`` is tokens ``[kL, (k+1)L)`` of that
stream. Nothing is done per document in Python when a plan is made: a shuffle, a gather and a cumulative sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomesh.config.schema import IGNORE
from evomesh.data.token_files.bin_dataset import DocumentSource
from evomesh.data.token_files.lines import TokenArray
from evomesh.data.token_files.shared_index import digest, shared_array

PACK_SEED = 1024  # of the order of documents inside a file; data.seed orders the packs

IndexArray = NDArray[np.int64]
PackOrder = Literal["internevo", "xtuner"]
Remainder = Literal["drop", "carry", "pad"]


@dataclass(frozen=True)
class Pack:
    """T packed tokens, as numpy.

    Attributes:
        tokens: [T] int64 inputs, never negative.
        labels: [T] int64, the token to predict, ``IGNORE`` where there is none.
        indexes: [T] int64 position within the segment.
        type_ids: [T] int64.
        cu_seqlens: [segments + 1] int32 bounds 0 .. T: attention stays inside a segment.
    """

    tokens: TokenArray
    labels: TokenArray
    indexes: IndexArray
    type_ids: IndexArray
    cu_seqlens: NDArray[np.int32]


@dataclass(frozen=True)
class PackRule:
    """How a stretch of tokens becomes inputs, targets and segments.

    Attributes:
        packed_length: T.
        seq_len: longest segment ("internevo"; longer pieces are split, their targets go on across the split).
        one_sample: ``pack_sample_into_one``: segments are every ``seq_len`` tokens whatever the documents' borders.
        order: "internevo": a document's last token has no target; "xtuner": it predicts the next document's first.
    """

    packed_length: int
    seq_len: int
    one_sample: bool = False
    order: PackOrder = "internevo"


class PackPlan:
    """Which documents make up each pack of a stream.

    Args:
        sources: files of the stream, each shuffled on its own.
        rule: packed length and the rest.
        remainder: what happens to the stream's last tokens: "drop" leaves them out, "pad" fills a last pack with
            ignored zeros ("carry" is "drop" for the one stream of all files).
        shared: folder in which the processes of a node keep one copy of the index; None: each its own.
    """

    def __init__(
        self,
        sources: Sequence[DocumentSource],
        rule: PackRule,
        remainder: Remainder = "drop",
        shared: Path | None = None,
    ) -> None:
        self.sources, self.rule = list(sources), rule
        self.first = np.cumsum(
            [0] + [len(source.lengths) for source in sources]
        )  # of each source in the stream
        # order: which document of its source stands at a place of the stream; ends: where it ends
        if shared is None:
            self.order: NDArray[np.int32] = self._make_order()
            self.ends: IndexArray = self._make_ends()
        else:
            key = digest(source.lengths for source in self.sources)
            self.order = shared_array(shared, f"{key}.order", self._make_order)
            self.ends = shared_array(shared, f"{key}.ends", self._make_ends)
        self.tokens = int(self.ends[-1]) if len(self.ends) else 0
        whole, rest = divmod(self.tokens, rule.packed_length)
        self.num_packs = whole + (1 if rest and remainder == "pad" else 0)
        self.dropped = 0 if remainder == "pad" else rest

    def __len__(self) -> int:
        return self.num_packs

    def _make_order(self) -> NDArray[np.int32]:
        orders = [_shuffled(len(source.lengths)) for source in self.sources]
        return orders[0] if len(orders) == 1 else np.concatenate([*orders, np.empty(0, np.int32)])

    def _make_ends(self) -> IndexArray:
        ends = np.empty(len(self.order), np.int64)
        for source, low, high in zip(self.sources, self.first[:-1], self.first[1:], strict=True):
            ends[low:high] = source.lengths[self.order[low:high]]
        return np.cumsum(ends, out=ends)

    def documents(self, pack: int) -> tuple[int, int]:
        """First and last-plus-one place in the stream of the documents that pack ``pack`` touches."""
        start = pack * self.rule.packed_length
        stop = min(start + self.rule.packed_length, self.tokens)
        first = int(np.searchsorted(self.ends, start, side="right"))
        return first, int(np.searchsorted(self.ends, stop, side="left")) + 1

    def read(self, pack: int) -> Pack:
        """Read pack ``pack``: its documents' lines, nothing else.

        Raises:
            UserError: a line of a file is broken.
        """
        first, last = self.documents(pack)
        start = pack * self.rule.packed_length
        ends = self.ends[first:last] - start
        stored, types = self._read_stream(first, last)
        # The first document may begin in the pack before: bring its head to negative places and cut it off.
        stored = stored[len(stored) - int(ends[-1]) :]
        return assemble(stored, ends, types, self.rule)

    def _read_stream(self, first: int, last: int) -> tuple[TokenArray, IndexArray]:
        """Tokens of stream places ``[first, last)`` and each of these documents' type."""
        parts: list[TokenArray] = []
        types: list[IndexArray] = []
        for number in range(int(np.searchsorted(self.first, first, side="right")) - 1, len(self.sources)):
            low, high = max(first, int(self.first[number])), min(last, int(self.first[number + 1]))
            if low < high:
                parts.append(self.sources[number].read(self.order[low:high]))
                types.append(np.full(high - low, self.sources[number].type_id, np.int64))
            if high >= last:
                break
        return (parts[0], types[0]) if len(parts) == 1 else (np.concatenate(parts), np.concatenate(types))


def _shuffled(count: int) -> NDArray[np.int32]:
    order = np.arange(count, dtype=np.int32)  # the shuffle's swaps do not depend on the dtype
    np.random.RandomState(PACK_SEED).shuffle(order)
    return order


def assemble(stored: TokenArray, ends: IndexArray, types: IndexArray, rule: PackRule) -> Pack:
    """One pack from its documents' tokens.

    Args:
        stored: tokens from the pack's start to the end of the last document it touches, signs as stored. Shorter
            than the packed length: the rest is padding. Longer: the surplus only gives the last target.
        ends: [n] where each document ends, from the pack's start; above 0, not decreasing.
        types: [n] type of each document.
        rule: packed length T, segments and targets.
    """
    length = rule.packed_length
    filled = min(len(stored), length)
    tokens = np.zeros(length, np.int64)
    np.abs(stored[:filled], out=tokens[:filled])
    targets = np.full(length, IGNORE, np.int64)
    following = stored[1 : length + 1]
    targets[: len(following)] = following
    if rule.order == "internevo":
        targets[ends[ends <= length] - 1] = IGNORE
    if rule.one_sample or rule.order == "xtuner":
        targets[length - 1] = IGNORE  # these two do not look past the end of the pack
    np.putmask(
        targets, targets <= 0, IGNORE
    )  # negative: input only; 0: the documents' format cannot train it
    edges = np.empty(len(ends) + 2, np.int64)  # bounds of the documents' pieces and of the padding
    edges[0], edges[-1] = 0, length
    np.minimum(ends, length, out=edges[1:-1])
    pieces = edges[1:] - edges[:-1]
    if rule.one_sample:
        bounds = np.arange(0, length + 1, rule.seq_len)
    else:
        bounds = np.append(edges[:-1][pieces > 0], length)
        if rule.order == "internevo":
            bounds = split_bounds(bounds, rule.seq_len)
    return Pack(
        tokens=tokens,
        labels=targets,
        indexes=np.arange(length) - np.repeat(bounds[:-1], bounds[1:] - bounds[:-1]),
        type_ids=np.repeat(np.append(types, 0), pieces),
        cu_seqlens=bounds.astype(np.int32),
    )


def split_bounds(bounds: IndexArray, seq_len: int) -> IndexArray:
    """Bounds with every piece longer than ``seq_len`` cut into ``seq_len`` segments from its start."""
    sizes = np.diff(bounds)
    if not len(sizes) or int(sizes.max()) <= seq_len:
        return bounds
    counts = -(-sizes // seq_len)
    number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.append(np.repeat(bounds[:-1], counts) + number * seq_len, bounds[-1])


class PackedCorpus:
    """All packs of all streams, numbered through in file order."""

    def __init__(self, plans: Sequence[PackPlan]) -> None:
        self.plans = list(plans)
        self.starts = np.cumsum([0] + [len(plan) for plan in plans])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, pack: int) -> tuple[PackPlan, int]:
        """Plan of a global pack number, and the pack's number in it."""
        which = int(np.searchsorted(self.starts, pack, side="right")) - 1
        return self.plans[which], pack - int(self.starts[which])

    def read(self, pack: int) -> Pack:
        plan, local = self.locate(pack)
        return plan.read(local)
