"""Validation sets: every folder with token files is one, and every target of it is seen exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

from evomesh.config.schema import IGNORE
from evomesh.data.batch import Batch
from evomesh.data.packing.loader import collate
from evomesh.data.packing.packs import IndexArray, Pack, PackRule, assemble, split_bounds
from evomesh.data.token_files.bin_dataset import DocumentSource
from evomesh.data.token_files.folders import TokenFile


class ValidationSet:
    """A named set, read in file order: every token of every document except its first is a target exactly once.

    A document longer than ``seq_len`` is split into segments of ``seq_len`` tokens, counted from its start. Attention
    stays inside a segment, and its last token still predicts the document's next. So the loss of a set does not depend
    on a document's neighbors, on the micro-batch size or on the number of ranks; packs hold several segments only to
    need less padding.

    Args:
        name: as in ``val/{name}_loss``.
        sources: its files.
        rule: packed length T and longest segment.
        micro_num: packs in a batch.
    """

    def __init__(self, name: str, sources: Sequence[DocumentSource], rule: PackRule, micro_num: int) -> None:
        self.name = name
        self.sources = list(sources)
        self.rule = rule
        self.micro_num = micro_num
        # The set is one stream: its documents one after the other, split into segments, which fill packs.
        counts = [len(source.lengths) for source in sources]
        lengths = np.concatenate([np.asarray(source.lengths, np.int64) for source in sources])
        self._first_document = np.cumsum([0, *counts])  # of each source
        self._document_ends = np.cumsum(lengths)
        document_bounds = np.unique(np.append(0, self._document_ends))
        self._segment_bounds = split_bounds(document_bounds, rule.seq_len)
        self._first_segment = _fill_packs(self._segment_bounds, rule.packed_length)  # of each pack
        self._last_document: tuple[int, IndexArray] = (-1, np.empty(0, np.int64))  # number and tokens

    @property
    def num_packs(self) -> int:
        return len(self._first_segment) - 1

    def num_batches(self, dp_size: int) -> int:
        """Return the number of batches that each rank yields."""
        return -(-self.num_packs // (dp_size * self.micro_num))

    def batches(self, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """Yield this rank's batches; where no pack is left, a batch has a pack of ignored targets only."""
        global_batch = dp_size * self.micro_num
        for number in range(self.num_batches(dp_size)):
            start = number * global_batch + dp_rank
            packs = range(start, start + global_batch, dp_size)
            yield collate(
                [self.read(pack) if pack < self.num_packs else self._empty_pack() for pack in packs]
            )

    def read(self, pack: int) -> Pack:
        """Read pack ``pack``."""
        first_segment, stop_segment = self._first_segment[pack : pack + 2]
        start = int(self._segment_bounds[first_segment])
        stop = int(self._segment_bounds[stop_segment])
        first = int(np.searchsorted(self._document_ends, start, side="right"))
        last = int(np.searchsorted(self._document_ends, stop))

        # Read whole documents, then drop what the first one has before the pack.
        stored = np.concatenate([self._read_document(number) for number in range(first, last + 1)])
        first_start = int(self._document_ends[first - 1]) if first else 0
        stored = stored[start - first_start :]
        size = stop - start
        ends = np.minimum(self._document_ends[first : last + 1], stop) - start
        types = np.zeros(len(ends), np.int64)
        assembled = assemble(stored[:size], ends, types, self.rule)
        if len(stored) > size:  # the pack ends inside a document, whose next token is a target too
            following = int(stored[size])
            assembled.labels[size - 1] = following if following > 0 else IGNORE
        return assembled

    def _read_document(self, number: int) -> IndexArray:
        """Read a document of the set; the last one is kept, since a long document is in many packs."""
        if self._last_document[0] != number:
            source = int(np.searchsorted(self._first_document, number, side="right")) - 1
            document = number - int(self._first_document[source])
            self._last_document = number, self.sources[source].read(np.array([document]))
        return self._last_document[1]

    def _empty_pack(self) -> Pack:
        nothing = np.empty(0, np.int64)
        return assemble(nothing, nothing, nothing, self.rule)


def _fill_packs(segment_bounds: IndexArray, length: int) -> IndexArray:
    """Return the first segment of each pack, then the number of segments.

    A pack takes as many whole segments as fit into ``length`` tokens.
    """
    num_segments = len(segment_bounds) - 1
    first_segment = [0]
    while first_segment[-1] < num_segments:
        limit = segment_bounds[first_segment[-1]] + length
        next_segment = int(np.searchsorted(segment_bounds, limit, side="right")) - 1
        first_segment.append(next_segment)
    return np.array(first_segment, np.int64)


def group_sets(files: Sequence[TokenFile], root_name: str) -> dict[str, list[TokenFile]]:
    """Group files by the name of their set: the name of their folder, or its path where two folders share a name."""
    folders = [PurePosixPath(file.name).parent for file in files]
    count = Counter(folder.name for folder in set(folders))
    sets: dict[str, list[TokenFile]] = {}
    for file, folder in zip(files, folders, strict=True):
        name = folder.name if count[folder.name] == 1 else folder.as_posix()
        if folder == PurePosixPath():
            name = root_name
        sets.setdefault(name, []).append(file)
    return sets
