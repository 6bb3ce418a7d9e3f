"""Validation sets: every folder with token files is one, every document of it is seen exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

from evomesh.data.batch import Batch
from evomesh.data.bin_dataset import BinDataset, Documents
from evomesh.data.folders import TokenFile
from evomesh.data.loader import collate
from evomesh.data.packed import Ints, Pack, PackRule, assemble


class ValidSet:
    """A named set, read in file order: whole documents, cut at ``seq_len``, side by side in rows of T tokens.

    A document is its own attention segment, so its loss does not depend on its neighbours, on the micro-batch size
    or on the number of ranks; rows are filled only to need less padding.

    Args:
        name: as in ``val/{name}_loss``.
        sources: its files.
        seq_len: tokens of a document that count; its tail is left out, as in the documents.
        micro_bsz: T = seq_len * micro_bsz.
        micro_num: rows in a batch.
    """

    def __init__(self, name: str, sources: Sequence[Documents], seq_len: int, micro_bsz: int, micro_num: int) -> None:
        self.name = name
        self.sources, self.seq_len, self.micro_num = list(sources), seq_len, micro_num
        self.rule = PackRule(seq_len * micro_bsz, seq_len)
        self.first = np.cumsum([0] + [len(source.lengths) for source in sources])
        lengths = np.concatenate([np.asarray(source.lengths, np.int64) for source in sources])
        self.truncated = int(np.maximum(lengths - seq_len, 0).sum())  # tokens beyond seq_len
        self.ends = np.cumsum(np.minimum(lengths, seq_len))
        self.bounds = _fill_rows(self.ends, self.rule.packed_length)

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
        first, last = int(self.bounds[row]), int(self.bounds[row + 1])
        begin = int(self.ends[first - 1]) if first else 0
        parts = []
        for source, low in zip(self.sources, self.first, strict=False):
            places = np.arange(max(first, int(low)), min(last, int(low) + len(source.lengths))) - int(low)
            if len(places):
                parts.append(_cut(source.read(places), np.asarray(source.lengths[places], np.int64), self.seq_len))
        return assemble(
            np.concatenate(parts), self.ends[first:last] - begin, np.zeros(last - first, np.int64), self.rule
        )

    def _empty(self) -> Pack:
        nothing = np.empty(0, np.int64)
        return assemble(nothing, nothing, nothing, self.rule)


def _fill_rows(ends: Ints, length: int) -> Ints:
    """First document of each row, then the number of documents: a row holds whole ones, at most ``length`` tokens."""
    bounds = [0]
    while bounds[-1] < len(ends):
        begin = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, begin + length, side="right")))
    return np.array(bounds, np.int64)


def _cut(tokens: Ints, lengths: Ints, seq_len: int) -> Ints:
    """Documents laid end to end, each without what lies beyond ``seq_len``."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return tokens[np.arange(len(tokens)) - starts < seq_len]


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
) -> ValidSet | None:
    """A set from its files, None when no document is left. ``shape``: seq_len, micro_bsz, micro_num."""
    sources = [BinDataset(file.path, name=file.name, min_length=min_length, vocab_size=vocab_size) for file in files]
    kept = [source for source in sources if len(source)]
    return ValidSet(name, kept, *shape) if kept else None
