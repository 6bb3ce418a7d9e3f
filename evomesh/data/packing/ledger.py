"""Look up which documents a step is trained on, and in which steps a document is used.

Nothing is recorded for this. The packs of a step follow from data, seed, step and
global batch, and the documents of a pack from the lengths in the metas, so every step
of a run can be looked up before, during and after it, in any layout of the same global
batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomesh.data.packing.corpus import Corpus
from evomesh.data.packing.staged import StagedCorpus
from evomesh.data.token_files.bin_dataset import BinDataset, DocumentSource
from evomesh.errors import UserError


@dataclass(frozen=True)
class LedgerEntry:
    """A part of a document in a micro-batch.

    Attributes:
        step, rank, micro_batch: optimizer step, data-parallel rank and micro-batch that read it.
        pack: number of the pack in the corpus.
        file, row: token file below the data folder, and its line, both counted from 0.
        start, stop: tokens ``[start, stop)`` of the document.
        offset: position in the pack of the first of them.
    """

    step: int
    rank: int
    micro_batch: int
    pack: int
    file: str
    row: int
    start: int
    stop: int
    offset: int


class StepLedger:
    """Looks up the steps of a run.

    Args:
        corpus: the training data of the run.
        dp_size: number of data-parallel ranks.

    Raises:
        UserError: the data is smaller than one step.
    """

    def __init__(self, corpus: Corpus | StagedCorpus, dp_size: int) -> None:
        self.corpus = corpus
        self.dp_size = dp_size
        self.sampler = corpus.sampler(dp_size)

    def step(
        self,
        step: int,
        rank: int | None = None,
    ) -> Iterator[LedgerEntry]:
        """Yield what the ranks (or one of them) read in a step, in the order of micro-batches and tokens."""
        position = self.sampler.seek(step)
        packs, _ = self.sampler.take(position)
        ranks = range(self.dp_size) if rank is None else [rank]
        for reader in ranks:
            own_packs = packs[reader :: self.dp_size].tolist()
            for micro_batch, pack in enumerate(own_packs):
                yield from self._pack(step, reader, micro_batch, pack)

    def _pack(
        self, step: int, rank: int, micro_batch: int, pack: int
    ) -> Iterator[LedgerEntry]:
        plan, number = self.corpus.locate(pack)
        for span in plan.spans(number):
            yield LedgerEntry(
                step,
                rank,
                micro_batch,
                pack,
                file=span.source.name,
                row=_row(span.source, span.document),
                start=span.start,
                stop=span.stop,
                offset=span.offset,
            )

    def uses(self, file: str, row: int, steps: range) -> Iterator[LedgerEntry]:
        """Yield each use of a document in some steps that follow each other.

        Raises:
            UserError: no such file or row, or the row is left out because it is too short.
        """
        # The document's packs never change. So a step that uses it is one that draws
        # one of these packs.
        wanted = self._packs_of(file, row)
        position = self.sampler.seek(steps.start)
        for step in steps:
            packs, position = self.sampler.take(position)
            entries = self._entries_of(step, packs, wanted)
            yield from _of_document(entries, file, row)

    def _entries_of(
        self, step: int, packs: NDArray[np.int64], wanted: Sequence[int]
    ) -> Iterator[LedgerEntry]:
        """Yield the entries of those of a step's packs that are wanted."""
        is_wanted = np.isin(packs, wanted)
        for index in np.flatnonzero(is_wanted).tolist():
            pack = int(packs[index])
            yield from self._pack_at(step, index, pack)

    def _pack_at(self, step: int, index: int, pack: int) -> Iterable[LedgerEntry]:
        """Return the entries of the step's pack number ``index``.

        Rank r reads packs[r::dp_size]: of eight packs for two ranks, index 5 is
        micro-batch 2 of rank 1.
        """
        micro_batch, rank = divmod(index, self.dp_size)
        return self._pack(step, rank, micro_batch, pack)

    def _packs_of(self, file: str, row: int) -> list[int]:
        """Return the numbers in the corpus of the packs that hold a part of a document."""
        packs = []
        for plan_number, source_number, document in self._find(file, row):
            first = self.corpus.first_pack(plan_number)
            plan = self.corpus.plans[plan_number]
            packs += [first + pack for pack in plan.packs_of(source_number, document)]
        return packs

    def _find(self, file: str, row: int) -> list[tuple[int, int, int]]:
        """Return the stream, the source in it and the number among its kept documents of a file's row.

        Data stages with packs of several lengths have the file in several streams.
        """
        found = []
        for plan_number, plan in enumerate(self.corpus.plans):
            for source_number, source in enumerate(plan.sources):
                if source.name == file:
                    document = _document(source, row)
                    found.append((plan_number, source_number, document))
        if found:
            return found
        some_names: list[str] = []
        for plan in self.corpus.plans[:8]:
            some_names += [source.name for source in plan.sources[:8]]
        names = ", ".join(some_names)
        raise UserError(
            f"no token file {file!r} in the data",
            where="--document",
            expected=f"one of {names} ...",
            code="EVO-DATA-023",
        )


def _row(source: DocumentSource, document: int) -> int:
    return source.row(document) if isinstance(source, BinDataset) else document


def _of_document(
    entries: Iterable[LedgerEntry], file: str, row: int
) -> Iterator[LedgerEntry]:
    for entry in entries:
        if entry.file == file and entry.row == row:
            yield entry


def _document(source: DocumentSource, row: int) -> int:
    """Return the number of a row among the documents that its source keeps."""
    rows = len(source.rows) if isinstance(source, BinDataset) else len(source.lengths)
    if not 0 <= row < rows:
        raise UserError(
            f"{source.name} has no row {row}",
            where="--document",
            expected=f"0 to {rows - 1}",
            code="EVO-DATA-023",
        )
    kept = source.kept if isinstance(source, BinDataset) else None
    if kept is None:
        return row
    document = int(np.searchsorted(kept, row))
    if document == len(kept) or kept[document] != row:
        raise UserError(
            f"row {row} of {source.name} is never used: it has fewer than data.min_length tokens",
            where="--document",
            code="EVO-DATA-023",
        )
    return document
