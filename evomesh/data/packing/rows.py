"""Micro-batches of one document a row (``data.use_packed_dataset=False``), by InternEvo's rules.

A micro-batch has ``micro_bsz`` rows of ``seq_len`` tokens. A row holds one document: what
is longer is cut, what is shorter is filled with ignored zeros, which are a segment of
their own. Laid end to end the rows are a pack, so that nothing after this module knows
of rows:

    documents 1 2 3, 4 5 6 7 8 with seq_len 4 and micro_bsz 2

    tokens       1 2 3 0 | 4 5 6 7       8 is left out
    labels       2 3 . . | 5 6 7 .       a row does not predict what follows it
    cu_seqlens   0 3 4 8
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from evomesh.config.data import DataConfig
from evomesh.data.packing.packs import (
    DocumentSpan,
    IndexArray,
    Pack,
    PackPlan,
    PackRule,
    Remainder,
    assemble,
)
from evomesh.data.token_files.bin_dataset import DocumentSource
from evomesh.data.token_files.lines import TokenArray


def make_plan(
    sources: Sequence[DocumentSource], config: DataConfig, shared: Path | None = None
) -> PackPlan:
    """Return the packs, or the rows, of one stream, as the ``data`` section asks for.

    Args:
        shared: folder in which the processes of a node keep one copy of the index; None: one copy per process.
    """
    kind = PackPlan if config.use_packed_dataset else RowPlan
    return kind(sources, PackRule.from_config(config), config.remainder, shared)


class RowPlan(PackPlan):
    """The packs of one stream with a document in each row.

    The stream is counted in rows of ``seq_len`` tokens, padding included: row i ends at
    token ``(i + 1) * seq_len`` of it.
    """

    ends_name = "row_ends"

    def __init__(
        self,
        sources: Sequence[DocumentSource],
        rule: PackRule,
        remainder: Remainder = "drop",
        shared: Path | None = None,
    ) -> None:
        super().__init__(sources, rule, remainder, shared)
        total = sum(int(source.lengths.sum()) for source in sources)
        self.dropped = total - self._tokens_in_rows()

    def _tokens_in_rows(self) -> int:
        """Return the tokens of documents that are in some row: not cut, and not of a last pack left out."""
        # The document at position i has row i: those past the last row are dropped.
        rows = self.num_packs * self.rule.rows
        ranges = pairwise(self.first_document)
        in_rows = 0
        for source, (start, stop) in zip(self.sources, ranges, strict=True):
            if start >= rows:
                break
            documents = self.document_order[start : min(stop, rows)]
            whole = source.lengths[documents]
            lengths = np.minimum(whole, self.rule.seq_len)
            in_rows += int(lengths.sum())
        return in_rows

    def _make_ends(self) -> IndexArray:
        rows = np.arange(1, len(self.document_order) + 1, dtype=np.int64)
        return rows * self.rule.seq_len

    def read(self, pack: int) -> Pack:
        """Read the documents of the pack's rows.

        Raises:
            UserError: a line of a file is broken.
        """
        documents = []
        types = []
        for span in self.spans(pack):
            source = span.source
            tokens = source.read(np.array([span.document]))
            documents.append(tokens)
            types.append(source.type_id)
        return assemble_rows(documents, types, self.rule)

    def spans(self, pack: int) -> list[DocumentSpan]:
        """Return the part of a document that each row holds; the rest of the row is padding."""
        spans = []
        for span in super().spans(pack):
            length = int(span.source.lengths[span.document])
            spans.append(replace(span, stop=min(span.stop, length)))
        return spans


def assemble_rows(
    documents: Sequence[TokenArray], types: Sequence[int], rule: PackRule
) -> Pack:
    """Make one pack of rows.

    Args:
        documents: stored tokens of at most ``rule.rows`` documents; missing ones are rows of padding.
        types: type of each document.
        rule: length of a row, and number of rows.
    """
    # Each row is two documents to the pack rule: its own, and one of zeros.
    stored = np.zeros(len(documents) * rule.seq_len, np.int64)
    ends = []
    row_types = []
    row_start = 0
    for tokens, kind in zip(documents, types, strict=True):
        cut = tokens[: rule.seq_len]
        document_end = row_start + len(cut)
        row_end = row_start + rule.seq_len
        stored[row_start:document_end] = cut
        ends += [document_end, row_end]
        row_types += [kind, 0]
        row_start = row_end
    return assemble(
        stored,
        np.array(ends, np.int64),
        np.array(row_types, np.int64),
        replace(rule, one_sample=False),
    )
