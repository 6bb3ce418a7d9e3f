"""Rows of a Hugging Face style folder, read in order from any place: all files that ``sources`` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from evomesh.data.records.reader import (
    FORMATS,
    SourceFile,
    SourceRecord,
    field_text,
    list_texts,
    open_files,
    read_records,
)
from evomesh.data.records.splits import EVERY, choose_split, kind_of, read_split_folders, split_of
from evomesh.data.token_files.folders import check_folder
from evomesh.errors import UserError

WINDOW = 1024  # rows that are shuffled among themselves


def find_rows(
    folder: str, key: str, subset: str | None, use: str, split: str | None = None
) -> tuple[list[SourceFile], list[str]]:
    """Data files of one split, in sorted order, and what a user should know about the choice.

    Args:
        folder: local folder.
        key: config key it came from.
        subset: ``data.subset_name``: a folder or archive inside, or a kind (such as "parquet").
        use: "train" or "valid".
        split: name of the split; None: the one that ``use`` means, if that is clear.

    Raises:
        UserError: nothing found, several splits may be meant, or an archive is broken.
    """
    root = check_folder(folder, key)
    every = list_texts(root)
    names = {file: file.place.relative_to(root) for file in every}
    files = [file for file in every if subset is None or _belongs(file, names[file], subset)]
    if every and not files:
        kinds = sorted({file.format for file in every})
        parts = sorted({names[file].parts[0] for file in every if len(names[file].parts) > 1})
        raise UserError(
            f"{root} has no folder or archive {subset!r} and no files of that kind",
            where="data.subset_name",
            expected=f"one of the kinds {', '.join(kinds)}{' or of ' if parts else ''}{', '.join(parts[:8])}",
        )
    if not files:
        raise UserError(
            f"no data file in {root}",
            where=key,
            expected=f"{', '.join(FORMATS)} files, or .tar, .tar.gz or .zip archives of them",
        )
    saved = read_split_folders(root)
    belongs = {file: split_of(names[file], saved) for file in files}
    taken = choose_split(sorted(set(belongs.values())), split, use, root)
    chosen = [file for file in files if taken in (belongs[file], EVERY)]
    warnings = []
    counts = Counter(file.format for file in chosen)
    if len(counts) > 1:
        found = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
        warnings.append(f"{root} mixes kinds of files ({found}): all are read; data.subset_name chooses some")
    unnamed = [file for file in files if not kind_of(belongs[file]) and belongs[file] != taken]
    if use == "train" and split is None and unnamed:
        warnings.append(
            f"{len(unnamed)} file(s) such as {names[unnamed[0]]} are left out: others are named {taken}; "
            f'data.split_name="{EVERY}" takes all'
        )
    held = [
        file for file in files if kind_of(belongs[file]) in ("validation", "test") and belongs[file] != taken
    ]
    if use == "train" and split is None and held:
        warnings.append(
            f"{len(held)} file(s) such as {names[held[0]]} are left out: their names say {belongs[held[0]]}; "
            f'data.split_name="{EVERY}" takes all'
        )
    return chosen, warnings


def _belongs(file: SourceFile, name: Path, subset: str) -> bool:
    inside = Path(subset).parts
    return file.format == subset or (name.parts[: len(inside)] == inside and len(name.parts) > len(inside))


@dataclass(frozen=True)
class RowCursor:
    """A place between two windows of the endless sequence of rows.

    Attributes:
        n: rows before it, over all passes.
        epoch: passes finished.
        window: windows before it in this pass.
        file, row: of the next row.
    """

    n: int = 0
    epoch: int = 0
    window: int = 0
    file: int = 0
    row: int = 0


@dataclass(frozen=True)
class RowWindow:
    """Shuffled rows ``n, n + 1, ..``: their texts and where they stand; and the place behind them."""

    n: int
    texts: list[str]
    places: list[str]
    behind: RowCursor


class RowStream:
    """All rows of all files, pass after pass, shuffled inside windows by a generator of (seed, pass, window).

    The shuffle buffer needs no state of its own: a window is a function of its cursor.

    Args:
        files: in order.
        field: column of the text.
        seed: of the shuffles.
    """

    def __init__(self, files: list[SourceFile], field: str, seed: int) -> None:
        self.files, self.field, self.seed = files, field, seed

    def windows(self, cursor: RowCursor) -> Iterator[RowWindow]:
        """Windows from ``cursor`` on, without end.

        Raises:
            UserError: a file cannot be read, a row lacks the field, or a whole pass holds no text.
        """
        filled = cursor.window > 0
        while True:
            rows = self._rows(cursor.file, cursor.row)
            while block := list(islice(rows, WINDOW)):
                order = np.random.RandomState([self.seed, cursor.epoch, cursor.window]).permutation(
                    len(block)
                )
                texts = [self._text(block[place][0]) for place in order]
                filled = filled or any(texts)
                _, file, row = block[-1]
                behind = replace(
                    cursor, n=cursor.n + len(block), window=cursor.window + 1, file=file, row=row + 1
                )
                yield RowWindow(cursor.n, texts, [block[place][0].where for place in order], behind)
                cursor = behind
            if not filled:
                raise UserError("no row holds any text", where=str(self.files[0].path.parent))
            cursor = RowCursor(n=cursor.n, epoch=cursor.epoch + 1)
            filled = False

    def _rows(self, file: int, row: int) -> Iterator[tuple[SourceRecord, int, int]]:
        for number, (opened, stream, _) in enumerate(open_files(self.files[file:]), file):
            first = row if number == file else 0
            for place, record in enumerate(read_from(stream, opened, first), first):
                yield record, number, place

    def _text(self, record: SourceRecord) -> str:
        try:
            return field_text(record, self.field)
        except UserError as error:
            error.fix = 'name the column of the text: data.content_name="..."'
            raise UserError(error.found, where=error.where, fix=error.fix) from None


def read_from(stream: IO[bytes], file: SourceFile, row: int) -> Iterator[SourceRecord]:
    """Records of an opened file from number ``row`` on; row groups of parquet are skipped unread."""
    if file.format != "parquet" or row == 0:
        yield from islice(read_records(stream, file), row, None)
        return
    import pyarrow.parquet

    parquet: Any = pyarrow.parquet.ParquetFile(stream)
    group, before = 0, 0
    while group < parquet.num_row_groups and before + parquet.metadata.row_group(group).num_rows <= row:
        before += parquet.metadata.row_group(group).num_rows
        group += 1
    number = before
    for batch in parquet.iter_batches(WINDOW, row_groups=list(range(group, parquet.num_row_groups))):
        for value in batch.to_pylist():
            number += 1
            if number > row:
                yield SourceRecord(value, f"{file.place} row {number}")
