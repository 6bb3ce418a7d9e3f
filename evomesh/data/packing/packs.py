"""Pack documents into sequences of equal length, by InternEvo's rules.

A file (or, with ``remainder="carry"``, all files one after the other) is one stream of tokens: its documents in the
order of NumPy's ``RandomState(1024)`` shuffle, the same in every epoch. Pack k is tokens ``[kT, (k+1)T)`` of that
stream. Planning never loops over documents in Python: it is a shuffle, a gather and a cumulative sum.

Shapes: T tokens of a pack, n documents that it touches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomesh.config.schema import IGNORE, DataConfig
from evomesh.data.token_files.bin_dataset import DocumentSource
from evomesh.data.token_files.lines import TokenArray
from evomesh.data.token_files.shared_index import digest, shared_array

PACK_SEED = 1024  # shuffles the documents inside a file; data.seed orders the packs

IndexArray = NDArray[np.int64]
PackOrder = Literal["internevo", "xtuner"]
Remainder = Literal["drop", "carry", "pad"]


@dataclass(frozen=True)
class Pack:
    """T packed tokens, as numpy.

    Attributes:
        tokens: [T] int64 inputs, never negative.
        labels: [T] int64, the token to predict, ``IGNORE`` where there is none.
        position_ids: [T] int64, position within the segment.
        type_ids: [T] int64.
        cu_seqlens: [segments + 1] int32, segment bounds 0 .. T: attention stays inside a segment.
    """

    tokens: TokenArray
    labels: TokenArray
    position_ids: IndexArray
    type_ids: IndexArray
    cu_seqlens: NDArray[np.int32]


@dataclass(frozen=True)
class PackRule:
    """How a range of the stream becomes inputs, targets and segments.

    Attributes:
        packed_length: T.
        seq_len: longest segment with order "internevo"; longer ones are split, and targets cross the split.
        one_sample: ``pack_sample_into_one``: a segment is every ``seq_len`` tokens, whatever the documents.
        order: "internevo": a document's last token has no target; "xtuner": it predicts the next document's first.
    """

    packed_length: int
    seq_len: int
    one_sample: bool = False
    order: PackOrder = "internevo"

    @staticmethod
    def from_config(config: DataConfig) -> PackRule:
        """Return the rule that the ``data`` section asks for."""
        return PackRule(config.packed_length, config.seq_len, config.pack_sample_into_one, config.order)


class PackPlan:
    """Which documents make up each pack of one stream.

    Args:
        sources: files of the stream; each is shuffled separately.
        rule: packed length, segments and targets.
        remainder: what happens to the stream's last tokens: "drop" leaves them out, "pad" fills the last pack with
            ignored zeros, "carry" is "drop" for the one stream of all files.
        shared: folder in which the processes of a node keep one copy of the index; None: each process has its own.

    Attributes:
        first_document: [sources + 1] position in the stream of each source's first document.
        document_order: [documents] number, within its source, of the document at each position of the stream.
        document_ends: [documents] token of the stream at which that document ends.
        tokens: tokens of the whole stream.
        dropped: tokens at its end that are in no pack.
    """

    def __init__(
        self,
        sources: Sequence[DocumentSource],
        rule: PackRule,
        remainder: Remainder = "drop",
        shared: Path | None = None,
    ) -> None:
        self.sources = list(sources)
        self.rule = rule
        counts = [len(source.lengths) for source in sources]
        self.first_document = np.cumsum([0, *counts])
        self.document_order: NDArray[np.int32]
        self.document_ends: IndexArray
        if shared is None:
            self.document_order = self._make_order()
            self.document_ends = self._make_ends()
        else:
            key = digest(source.lengths for source in self.sources)
            self.document_order = shared_array(shared, f"{key}.order", self._make_order)
            self.document_ends = shared_array(shared, f"{key}.ends", self._make_ends)
        self.tokens = int(self.document_ends[-1]) if len(self.document_ends) else 0
        self.num_packs, left_over = divmod(self.tokens, rule.packed_length)
        self.dropped = left_over
        if remainder == "pad":
            self.num_packs += 1 if left_over else 0
            self.dropped = 0

    def __len__(self) -> int:
        return self.num_packs

    def _make_order(self) -> NDArray[np.int32]:
        orders = [_shuffled(len(source.lengths)) for source in self.sources]
        if len(orders) == 1:
            return orders[0]
        return np.concatenate([*orders, np.empty(0, np.int32)])

    def _make_ends(self) -> IndexArray:
        lengths = np.empty(len(self.document_order), np.int64)
        for number, source in enumerate(self.sources):
            start, stop = self.first_document[number : number + 2]
            lengths[start:stop] = source.lengths[self.document_order[start:stop]]
        return np.cumsum(lengths, out=lengths)

    def document_range(self, pack: int) -> tuple[int, int]:
        """Return positions in the stream of the first document that ``pack`` touches, and of the one after the last."""
        start = pack * self.rule.packed_length
        stop = min(start + self.rule.packed_length, self.tokens)
        first = np.searchsorted(self.document_ends, start, side="right")
        last = np.searchsorted(self.document_ends, stop, side="left")
        return int(first), int(last) + 1

    def read(self, pack: int) -> Pack:
        """Read the lines of the documents that ``pack`` touches and assemble it.

        Raises:
            UserError: a line of a file is broken.
        """
        start = pack * self.rule.packed_length
        first, stop = self.document_range(pack)
        ends = self.document_ends[first:stop] - start
        stored, types = self._read_documents(first, stop)
        # The first document may begin in an earlier pack: drop its tokens before this pack's start.
        before = len(stored) - int(ends[-1])
        return assemble(stored[before:], ends, types, self.rule)

    def _read_documents(self, first: int, stop: int) -> tuple[TokenArray, IndexArray]:
        """Return tokens and types of the documents at positions ``[first, stop)``, which may span several sources."""
        tokens: list[TokenArray] = []
        types: list[IndexArray] = []
        number = int(np.searchsorted(self.first_document, first, side="right")) - 1
        while first < stop:
            source = self.sources[number]
            source_stop = min(stop, int(self.first_document[number + 1]))
            if first < source_stop:
                documents = self.document_order[first:source_stop]
                tokens.append(source.read(documents))
                types.append(np.full(len(documents), source.type_id, np.int64))
            first = source_stop
            number += 1
        if len(tokens) == 1:
            return tokens[0], types[0]
        return np.concatenate(tokens), np.concatenate(types)


def _shuffled(count: int) -> NDArray[np.int32]:
    order = np.arange(count, dtype=np.int32)  # the shuffle's swaps do not depend on the dtype
    np.random.RandomState(PACK_SEED).shuffle(order)
    return order


def assemble(stored: TokenArray, ends: IndexArray, types: IndexArray, rule: PackRule) -> Pack:
    """Make one pack from its documents' tokens.

    Args:
        stored: tokens from the pack's start to the end of the last document it touches, signs as stored. When they
            are fewer than T, the rest is padding; those past T only give the last target.
        ends: [n] where each document ends, counted from the pack's start; positive, not decreasing.
        types: [n] type of each document.
        rule: packed length T, segments and targets.
    """
    length = rule.packed_length
    filled = min(len(stored), length)
    tokens = np.zeros(length, np.int64)
    np.abs(stored[:filled], out=tokens[:filled])

    # Edges of the documents inside the pack, then of the padding: 0 .. T, some of them equal.
    edges = np.empty(len(ends) + 2, np.int64)
    edges[0] = 0
    edges[-1] = length
    np.minimum(ends, length, out=edges[1:-1])

    bounds = _segment_bounds(edges, rule)
    segment_start = np.repeat(bounds[:-1], np.diff(bounds))
    return Pack(
        tokens=tokens,
        labels=_labels(stored, ends, rule),
        position_ids=np.arange(length) - segment_start,
        type_ids=np.repeat(np.append(types, 0), np.diff(edges)),
        cu_seqlens=bounds.astype(np.int32),
    )


def _labels(stored: TokenArray, ends: IndexArray, rule: PackRule) -> TokenArray:
    """Return the target of each of the T positions: the next stored token, where it may be one."""
    length = rule.packed_length
    labels = np.full(length, IGNORE, np.int64)
    following = stored[1 : length + 1]
    labels[: len(following)] = following
    if rule.order == "internevo":
        last_tokens = ends[ends <= length] - 1
        labels[last_tokens] = IGNORE
    if rule.one_sample or rule.order == "xtuner":
        labels[length - 1] = IGNORE  # these two do not look past the end of the pack
    # A negative id is an input only. 0 is never a target: InternEvo's format cannot tell it from a masked 0.
    np.putmask(labels, labels <= 0, IGNORE)
    return labels


def _segment_bounds(edges: IndexArray, rule: PackRule) -> IndexArray:
    """Return the bounds 0 .. T of the attention segments, from the edges of documents and padding."""
    length = rule.packed_length
    if rule.one_sample:
        return np.arange(0, length + 1, rule.seq_len)
    starts = edges[:-1]
    not_empty = np.diff(edges) > 0
    bounds = np.append(starts[not_empty], length)
    return split_bounds(bounds, rule.seq_len) if rule.order == "internevo" else bounds


def split_bounds(bounds: IndexArray, seq_len: int) -> IndexArray:
    """Split every segment longer than ``seq_len`` into parts of ``seq_len`` tokens, counted from its start."""
    sizes = np.diff(bounds)
    if not len(sizes) or int(sizes.max()) <= seq_len:
        return bounds
    # Segment i becomes counts[i] parts; its part j starts at bounds[i] + j * seq_len.
    counts = -(-sizes // seq_len)
    parts_before = np.cumsum(counts) - counts
    part = np.arange(int(counts.sum())) - np.repeat(parts_before, counts)
    starts = np.repeat(bounds[:-1], counts) + part * seq_len
    return np.append(starts, bounds[-1])
