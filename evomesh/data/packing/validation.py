"""Validation sets: every folder with token files is one, every target of it is seen exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

from evomesh.config.schema import IGNORE
from evomesh.data.batch import Batch
from evomesh.data.packing.loader import collate
from evomesh.data.packing.packs import IndexArray, Pack, PackRule, assemble, split_bounds
from evomesh.data.token_files.bin_dataset import BinDataset, DocumentSource
from evomesh.data.token_files.folders import TokenFile


class ValidationSet:
    """A named set, read in file order: every token of every document but its first is a target exactly once.

    A document longer than ``seq_len`` is cut into pieces of ``seq_len`` tokens, counted from its start; each piece is
    its own attention segment and its last token still predicts the document's next. So the loss of a set does not
    depend on the neighbours of a document, on the micro-batch size or on the number of ranks; rows are filled with
    several pieces only to need less padding.

    Args:
        name: as in ``val/{name}_loss``.
        sources: its files.
        seq_len: longest piece.
        micro_bsz: T = seq_len * micro_bsz tokens in a row.
        micro_num: rows in a batch.
    """

    def __init__(
        self, name: str, sources: Sequence[DocumentSource], seq_len: int, micro_bsz: int, micro_num: int
    ) -> None:
        self.name = name
        self.sources, self.micro_num = list(sources), micro_num
        self.rule = PackRule(seq_len * micro_bsz, seq_len)
        self.first = np.cumsum([0] + [len(source.lengths) for source in sources])
        self.ends = np.cumsum(np.concatenate([np.asarray(source.lengths, np.int64) for source in sources]))
        self.cuts = split_bounds(np.unique(np.concatenate([[0], self.ends])), seq_len)
        self.bounds = _fill_rows(self.cuts, self.rule.packed_length)
        self._last: tuple[int, IndexArray] = (-1, np.empty(0, np.int64))  # a long document serves many rows

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1

    def num_batches(self, dp_size: int) -> int:
        """Batches that each rank yields."""
        return -(-self.num_rows // (dp_size * self.micro_num))

    def batches(self, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """This rank's batches; a place for which no row is left holds ignored targets only."""
        for number in range(self.num_batches(dp_size)):
            start = number * dp_size * self.micro_num + dp_rank
            rows = range(start, start + dp_size * self.micro_num, dp_size)
            yield collate([self.row(row) if row < self.num_rows else self._empty() for row in rows])

    def row(self, row: int) -> Pack:
        """Row ``row`` of T tokens."""
        begin, end = (int(self.cuts[bound]) for bound in self.bounds[row : row + 2])
        documents = range(
            int(np.searchsorted(self.ends, begin, side="right")), int(np.searchsorted(self.ends, end)) + 1
        )
        origin = int(self.ends[documents[0] - 1]) if documents[0] else 0
        stored = np.concatenate([self._document(document) for document in documents])[begin - origin :]
        ends = np.minimum(self.ends[documents.start : documents.stop], end) - begin
        pack = assemble(stored[: end - begin], ends, np.zeros(len(ends), np.int64), self.rule)
        if len(stored) > end - begin:  # the row ends within a document: its next token is a target too
            following = int(stored[end - begin])
            pack.labels[end - begin - 1] = following if following > 0 else IGNORE
        return pack

    def _document(self, number: int) -> IndexArray:
        if self._last[0] != number:
            which = int(np.searchsorted(self.first, number, side="right")) - 1
            self._last = number, self.sources[which].read(np.array([number - int(self.first[which])]))
        return self._last[1]

    def _empty(self) -> Pack:
        nothing = np.empty(0, np.int64)
        return assemble(nothing, nothing, nothing, self.rule)


def _fill_rows(cuts: IndexArray, length: int) -> IndexArray:
    """First piece of each row, then the number of pieces: a row holds whole ones, at most ``length`` tokens."""
    bounds = [0]
    while bounds[-1] < len(cuts) - 1:
        bounds.append(int(np.searchsorted(cuts, cuts[bounds[-1]] + length, side="right")) - 1)
    return np.array(bounds, np.int64)


def group_sets(files: Sequence[TokenFile], root_name: str) -> dict[str, list[TokenFile]]:
    """Files by the name of their set: their folder's name, or its path where two folders share a name."""
    folders = [PurePosixPath(file.name).parent.as_posix() for file in files]
    count = Counter(PurePosixPath(folder).name for folder in set(folders))
    sets: dict[str, list[TokenFile]] = {}
    for file, folder in zip(files, folders, strict=True):
        name = PurePosixPath(folder).name
        label = root_name if folder == "." else name if count[name] == 1 else folder
        sets.setdefault(label, []).append(file)
    return sets


def open_set(
    name: str, files: Sequence[TokenFile], *, min_length: int, vocab_size: int, shape: tuple[int, int, int]
) -> ValidationSet | None:
    """A set from its files, None when no document is left. ``shape``: seq_len, micro_bsz, micro_num."""
    sources = [
        BinDataset(file.path, name=file.name, min_length=min_length, vocab_size=vocab_size) for file in files
    ]
    kept = [source for source in sources if len(source)]
    return ValidationSet(name, kept, *shape) if kept else None
