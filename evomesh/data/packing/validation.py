"""Read validation sets: every folder with token files is one, and every target in it is seen exactly once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from evomesh.data.batch import Batch
from evomesh.data.packing.loader import collate
from evomesh.data.packing.packs import (
    IndexArray,
    Pack,
    PackRule,
    assemble,
    split_bounds,
)
from evomesh.data.token_files.bin_dataset import DocumentSource
from evomesh.data.token_files.lines import TokenArray


class ValidationSet:
    """A named set, read in file order: every token of every document except its first is a target exactly once.

    A document longer than ``seq_len`` is split into segments of ``seq_len`` tokens,
    counted from its start. Attention stays inside a segment, and its last token still
    predicts the document's next. So the loss of a set does not depend on a document's
    neighbors, on the micro-batch size or on the number of ranks; packs hold several
    segments only to need less padding.

    Args:
        name: part of the metric's name, ``val/{name}_loss``.
        sources: files of the set.
        rule: packed length T and longest segment.
        micro_num: packs in a batch.
        text_bytes: bytes of the texts whose tokens are the targets; None if they are not known.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[DocumentSource],
        rule: PackRule,
        micro_num: int,
        text_bytes: int | None = None,
    ) -> None:
        self.name = name
        self.text_bytes = text_bytes
        self.sources = list(sources)
        self.rule = rule
        self.micro_num = micro_num

        # The set is one stream of tokens: its documents one after the other. Bounds are
        # tokens of the stream.
        counts = [len(source.lengths) for source in sources]
        # Number of each source's first document.
        self._first_document = [0, *accumulate(counts)]
        lengths = np.concatenate([source.lengths for source in sources])
        after_zero = np.append(0, lengths)
        self._document_bounds = np.cumsum(after_zero, dtype=np.int64)

        # Its documents are split into segments, and each pack takes as many of these as fit. Empty documents have no
        # segment: they repeat a bound.
        not_empty = np.unique(self._document_bounds)
        self._segment_bounds = split_bounds(not_empty, rule.seq_len)
        self._pack_bounds = _fill_packs(self._segment_bounds, rule.packed_length)

        # The last document read, by number and tokens: a long one is read by several
        # packs.
        nothing = np.empty(0, np.int64)
        self._last_read: tuple[int, IndexArray] = (-1, nothing)

    @property
    def num_packs(self) -> int:
        return len(self._pack_bounds) - 1

    def num_batches(self, dp_size: int) -> int:
        """Return the number of batches that each rank yields."""
        return -(-self.num_packs // (dp_size * self.micro_num))

    def batches(self, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """Yield this rank's batches; every rank has the same number of them.

        A rank that has no pack left gets one whose targets are all ignored.
        """
        global_batch = dp_size * self.micro_num
        for number in range(self.num_batches(dp_size)):
            start = number * global_batch
            packs = range(start + dp_rank, start + global_batch, dp_size)
            yield collate([self.read(pack) for pack in packs])

    def read(self, pack: int) -> Pack:
        """Read a pack by its number; past the last one it has no target."""
        if pack >= self.num_packs:
            nothing = np.empty(0, np.int64)
            return assemble(nothing, nothing, nothing, self.rule)
        bounds = self._pack_bounds
        start = int(bounds[pack])
        stop = int(bounds[pack + 1])
        length = stop - start
        numbers = self._documents_of(start, stop)
        stored = self._read_from(start, numbers)
        tokens = stored[:length]
        ends = self._ends_in_pack(numbers, start, stop)
        types = np.zeros_like(ends)
        assembled = assemble(tokens, ends, types, self.rule)

        # The pack may end inside a document, whose next token is a target too.
        if len(stored) > length:
            following = stored[length]
            if following > 0:
                assembled.labels[length - 1] = following
        return assembled

    def _ends_in_pack(self, numbers: range, start: int, stop: int) -> IndexArray:
        """Return where each document ends, counted from the start of the pack; the last one may reach beyond it."""
        document_ends = self._document_bounds[1:]
        ends = document_ends[numbers.start : numbers.stop]
        return np.minimum(ends, stop) - start

    def _documents_of(self, start: int, stop: int) -> range:
        """Return the documents that overlap tokens of the set: of [0, 10) and [10, 15), both overlap [8, 13)."""
        bounds = self._document_bounds
        first = np.searchsorted(bounds, start, side="right") - 1
        after_last = np.searchsorted(bounds, stop)
        return range(int(first), int(after_last))

    def _read_from(self, start: int, numbers: range) -> TokenArray:
        """Return the tokens of neighboring documents, without those of the first that precede ``start`` in the set."""
        documents = [self._read_document(number) for number in numbers]
        before = start - self._document_bounds[numbers.start]
        return np.concatenate(documents)[before:]

    def _read_document(self, number: int) -> IndexArray:
        """Read a document of the set; the last one is kept, since a long document is in many packs."""
        last_number, tokens = self._last_read
        if number != last_number:
            source_number = bisect_right(self._first_document, number) - 1
            source = self.sources[source_number]
            document = number - self._first_document[source_number]
            tokens = source.read(np.array([document]))
            self._last_read = (number, tokens)
        return tokens


def _fill_packs(segment_bounds: IndexArray, length: int) -> IndexArray:
    """Return the bounds of packs that take as many whole segments as fit into ``length`` tokens."""
    # Segments 0 3 5 9 12 fill packs of 8 tokens as 0 5 12: the third ends at 9, past
    # the first pack.
    start = segment_bounds[0]
    bounds = [start]
    while start < segment_bounds[-1]:
        # The pack ends with the last segment that ends inside it; every segment is at
        # most a pack long.
        limit = start + length
        next_segment = np.searchsorted(segment_bounds, limit, side="right")
        start = segment_bounds[next_segment - 1]
        bounds.append(start)
    return np.array(bounds, np.int64)


class MemoryDocuments:
    """Tokenized documents held in memory: a validation set of text."""

    type_id = 0

    def __init__(
        self, name: str, documents: Sequence[TokenArray], text_bytes: int | None = None
    ) -> None:
        self.name = name
        self.text_bytes = text_bytes
        self.documents = documents
        self.lengths: NDArray[np.integer] = np.array(
            [len(document) for document in documents], np.int64
        )

    def read(self, documents: NDArray[np.integer]) -> TokenArray:
        """Return the tokens of the given documents, one after the other."""
        return np.concatenate([self.documents[int(number)] for number in documents])
