"""Pack documents into sequences of equal length, by InternEvo's rules.

A file (or, with ``remainder="carry"``, all files one after the other) is one stream of
tokens: its documents in the order of NumPy's ``RandomState(1024)`` shuffle, the same in
every epoch. Pack k is tokens ``[kT, (k+1)T)`` of that stream. Planning is a shuffle, a
gather and a cumulative sum; it never loops over documents in Python.

Shapes: T tokens of a pack, n documents that it touches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomesh.config.data import DataConfig
from evomesh.config.schema import IGNORE
from evomesh.data.token_files.bin_dataset import DocumentSource
from evomesh.data.token_files.lines import TokenArray
from evomesh.data.token_files.shared_index import digest, shared_array

PACK_SEED = 1024  # shuffles the documents inside a file; data.seed orders the packs

IndexArray = NDArray[np.int64]
PackOrder = Literal["internevo", "xtuner"]
Remainder = Literal["drop", "carry", "pad"]


@dataclass(frozen=True)
class Pack:
    """T packed tokens, as NumPy arrays.

    Attributes:
        tokens: [T] int64 inputs, never negative.
        labels: [T] int64, the token to predict, ``IGNORE`` where there is none.
        position_ids: [T] int64, position within the segment.
        type_ids: [T] int64, type of the document.
        cu_seqlens: [segments + 1] int32, segment bounds 0 .. T: attention stays inside a segment.
    """

    tokens: TokenArray
    labels: TokenArray
    position_ids: IndexArray
    type_ids: IndexArray
    cu_seqlens: NDArray[np.int32]


@dataclass(frozen=True)
class PackRule:
    """Rule that turns a range of the stream into inputs, targets and segments.

    Attributes:
        packed_length: T.
        seq_len: longest segment with order "internevo"; longer ones are split, and targets cross the split.
        one_sample: ``pack_sample_into_one``: a segment is every ``seq_len`` tokens, whatever the documents.
        order: "internevo": a document's last token has no target; "xtuner": it predicts the next document's first.
        rows: rows of one document each (``use_packed_dataset=False``, see rows.py); 0: documents laid end to end.
    """

    packed_length: int
    seq_len: int
    one_sample: bool = False
    order: PackOrder = "internevo"
    rows: int = 0

    @property
    def crosses_documents(self) -> bool:
        """Return whether a document's first token is the target of the token before it."""
        return self.order == "xtuner" and not self.rows

    @staticmethod
    def from_config(config: DataConfig) -> PackRule:
        """Return the rule that the ``data`` section asks for."""
        return PackRule(
            config.packed_length,
            config.seq_len,
            config.pack_sample_into_one,
            config.order,
            rows=0 if config.use_packed_dataset else config.micro_bsz,
        )


@dataclass(frozen=True)
class DocumentSpan:
    """The part of one document that a pack holds.

    Attributes:
        source: the file that the document is in.
        document: its number among the documents that the source keeps.
        start, stop: its tokens ``[start, stop)`` that are in the pack.
        offset: position in the pack of the first of them.
    """

    source: DocumentSource
    document: int
    start: int
    stop: int
    offset: int


class PackPlan:
    """The packs of one stream: which documents each one is made of.

    Args:
        sources: files of the stream; each is shuffled separately.
        rule: packed length, segments and targets.
        remainder: what happens to the stream's last tokens: "drop" leaves them out, "pad" fills the last pack with
            ignored zeros, "carry" is "drop" for the one stream of all files.
        shared: folder in which the processes of a node keep one copy of the index; None: one copy per process.

    Attributes:
        first_document: position in the stream of each source's first document, then the number of documents.
        document_order: [documents] number, within its source, of the document at each position of the stream.
        document_ends: [documents] token of the stream at which that document ends.
        tokens: tokens of the whole stream.
        num_packs: packs of the stream.
        dropped: tokens at its end that are in no pack.
    """

    ends_name = "ends"  # of document_ends, in the folder of shared arrays

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
        self.first_document = [0, *accumulate(counts)]
        self.document_order: NDArray[np.int32]
        self.document_ends: IndexArray
        # Order and ends take 12 bytes per document: the processes of a host map one
        # file rather than hold a copy each.
        if shared is None:
            self.document_order = self._make_order()
            self.document_ends = self._make_ends()
        else:
            key = digest(source.lengths for source in self.sources)
            self.document_order = shared_array(shared, f"{key}.order", self._make_order)
            self.document_ends = shared_array(
                shared, f"{key}.{self.ends_name}", self._make_ends
            )
        self.tokens = int(self.document_ends[-1]) if len(self.document_ends) else 0
        self.num_packs, left_over = divmod(self.tokens, rule.packed_length)
        self.dropped = left_over
        if remainder == "pad":
            self.num_packs += 1 if left_over else 0
            self.dropped = 0

    def __len__(self) -> int:
        return self.num_packs

    def _make_order(self) -> NDArray[np.int32]:
        # A file has the same order whatever the other files are: its generator is new.
        order = np.empty(self.first_document[-1], np.int32)
        for start, stop in pairwise(self.first_document):
            order[start:stop] = np.arange(stop - start)
            # Its swaps do not depend on the dtype.
            np.random.RandomState(PACK_SEED).shuffle(order[start:stop])
        return order

    def _make_ends(self) -> IndexArray:
        ranges = pairwise(self.first_document)
        lengths = np.empty(len(self.document_order), np.int64)
        for source, (start, stop) in zip(self.sources, ranges, strict=True):
            documents = self.document_order[start:stop]
            lengths[start:stop] = source.lengths[documents]
        # In place: a corpus may have a billion documents, 8 bytes each.
        return np.cumsum(lengths, out=lengths)

    def _span(self, position: int) -> tuple[int, int]:
        """Return the tokens ``[start, end)`` of the stream that the document at a position has."""
        start = int(self.document_ends[position - 1]) if position else 0
        return start, int(self.document_ends[position])

    def document_range(self, pack: int) -> tuple[int, int]:
        """Return the positions ``[first, stop)`` in the stream of the documents that ``pack`` touches."""
        start = pack * self.rule.packed_length
        end = min(start + self.rule.packed_length, self.tokens)
        first = np.searchsorted(self.document_ends, start, side="right")
        last = np.searchsorted(self.document_ends, end, side="left")
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
        # The first document may begin in an earlier pack: drop its tokens before this
        # pack's start.
        before = len(stored) - int(ends[-1])
        return assemble(stored[before:], ends, types, self.rule)

    def spans(self, pack: int) -> list[DocumentSpan]:
        """Return the parts of documents that make up ``pack``, in its order; what they leave free is padding."""
        start = pack * self.rule.packed_length
        end = min(start + self.rule.packed_length, self.tokens)
        first, stop = self.document_range(pack)
        spans = []
        for position in range(first, stop):
            document_start, document_end = self._span(position)
            inside_start = max(start, document_start)
            inside_stop = min(end, document_end)
            if inside_start >= inside_stop:
                continue  # a document without tokens
            span = DocumentSpan(
                source=self.sources[bisect_right(self.first_document, position) - 1],
                document=int(self.document_order[position]),
                start=inside_start - document_start,
                stop=inside_stop - document_start,
                offset=inside_start - start,
            )
            spans.append(span)
        return spans

    def packs_of(self, source: int, document: int) -> range:
        """Return the packs that hold tokens of a kept document of ``self.sources[source]``."""
        position = self._position(source, document)
        start, end = self._span(position)
        if start == end:
            return range(0)
        # Tokens 1500 to 4999 of the stream, in packs of 1024, are in the packs 1 to 4;
        # a dropped tail is in none.
        length = self.rule.packed_length
        first_pack = start // length
        after_last = -(-end // length)  # rounded up
        return range(first_pack, min(after_last, self.num_packs))

    def _position(self, source: int, document: int) -> int:
        """Return the position in the stream of a kept document of ``self.sources[source]``."""
        first, stop = self.first_document[source : source + 2]
        is_document = self.document_order[first:stop] == document
        (number,) = np.flatnonzero(is_document).tolist()
        return first + int(number)

    def _read_documents(self, first: int, stop: int) -> tuple[TokenArray, IndexArray]:
        """Return tokens and types of the documents at positions ``[first, stop)``, which may span several sources."""
        tokens: list[TokenArray] = []
        types: list[int] = []
        number = bisect_right(self.first_document, first) - 1
        while first < stop:
            source = self.sources[number]
            source_stop = min(stop, self.first_document[number + 1])
            documents = self.document_order[first:source_stop]
            if len(documents):
                tokens_of_source = source.read(documents)
                tokens.append(tokens_of_source)
                types += [source.type_id] * len(documents)
            first = source_stop
            number += 1
        # Mostly one file, whose tokens need no copy.
        stored = tokens[0]
        if len(tokens) > 1:
            stored = np.concatenate(tokens)
        return stored, np.array(types, np.int64)


def assemble(
    stored: TokenArray, ends: IndexArray, types: IndexArray, rule: PackRule
) -> Pack:
    """Make one pack from its documents' tokens.

    With T = 8, order "internevo" and the documents 1 2 3, 4 -5 6 and 7 8 9 9 of the
    types 0, 1 and 0, which end at 3, 6 and 10:

        tokens        1  2  3  4  5  6  7  8
        labels        2  3  .  .  6  .  8  9    "." is IGNORE
        position_ids  0  1  2  0  1  2  0  1
        type_ids      0  0  0  1  1  1  0  0
        cu_seqlens    0  3  6  8

    A label is the next token, unless that begins another document or is masked (-5).
    The last label, 9, is already a token of the next pack.

    Args:
        stored: tokens from the pack's start to the end of the last document it touches, signs as stored. When they
            are fewer than T, the rest is padding; those past T only give the last target.
        ends: [n] where each document ends, counted from the pack's start; positive, not decreasing.
        types: [n] type of each document.
        rule: packed length T, segments and targets.
    """
    # 1. Tokens: the sign only says whether one is a target.
    length = rule.packed_length
    inside = stored[:length]
    tokens = np.zeros(length, np.int64)
    tokens[: len(inside)] = np.abs(inside)

    # 2. Types, from the edges of the documents inside the pack and of the padding, which
    #    has type 0. The edges ascend from 0 to T, and equal ones bound nothing.
    ends_inside = np.minimum(ends, length)
    edges = np.concatenate([[0], ends_inside, [length]])
    lengths_inside = np.diff(edges)
    types_and_padding = np.append(types, 0)
    type_ids = np.repeat(types_and_padding, lengths_inside)

    # 3. A position counts from the start of its segment.
    bounds = _segment_bounds(edges, rule)
    starts = bounds[:-1]
    start_of_token = np.repeat(starts, np.diff(bounds))
    position_ids = np.arange(length) - start_of_token

    labels = _labels(stored, ends, rule)
    return Pack(
        tokens=tokens,
        labels=labels,
        position_ids=position_ids,
        type_ids=type_ids,
        cu_seqlens=bounds.astype(np.int32),
    )


def _labels(stored: TokenArray, ends: IndexArray, rule: PackRule) -> TokenArray:
    """Return the target of each of the T positions: the next stored token if it may be a target, else ``IGNORE``."""
    length = rule.packed_length
    labels = np.full(length, IGNORE, np.int64)
    following = stored[1 : length + 1]
    labels[: len(following)] = following
    if rule.order == "internevo":
        # A document's last token has no next one.
        ends_inside = ends[ends <= length]
        last_positions = ends_inside - 1
        labels[last_positions] = IGNORE
    if rule.one_sample or rule.order == "xtuner":
        # These two rules do not look past the end of the pack.
        labels[-1] = IGNORE
    # A negative id is only an input. 0 is never a target: InternEvo's format cannot
    # tell it from a masked 0.
    np.putmask(labels, labels <= 0, IGNORE)
    return labels


def _segment_bounds(edges: IndexArray, rule: PackRule) -> IndexArray:
    """Return the bounds 0 .. T of the attention segments, from the edges of documents and padding."""
    length = rule.packed_length
    if rule.one_sample:
        return np.arange(0, length + 1, rule.seq_len)
    is_document = np.diff(edges) > 0  # equal edges enclose no token
    starts = edges[:-1][is_document]
    bounds = np.append(starts, length)
    if rule.order == "xtuner":
        return bounds
    return split_bounds(bounds, rule.seq_len)


def split_bounds(bounds: IndexArray, seq_len: int) -> IndexArray:
    """Split every segment longer than ``seq_len`` into parts of ``seq_len`` tokens, counted from its start."""
    sizes = np.diff(bounds)
    if sizes.max(initial=0) <= seq_len:
        return bounds
    # Segment i becomes counts[i] parts; its part j starts at bounds[i] + j * seq_len.
    # The bounds [0 5 7] with seq_len 2 have counts [3 1], so the parts are i = [0 0 0
    # 1], j = [0 1 2 0], and the result is [0 2 4 5 7].
    counts = -(-sizes // seq_len)  # rounded up
    parts_before = np.cumsum(counts) - counts
    segments = np.arange(len(sizes))
    i = np.repeat(segments, counts)
    parts = np.arange(len(i))
    j = parts - parts_before[i]
    distances = j * seq_len
    starts = bounds[i] + distances
    end = bounds[-1]
    return np.append(starts, end)
