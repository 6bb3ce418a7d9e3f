"""Rows of a Hugging Face style folder, read in order from any place: parquet, arrow, json, jsonl and txt files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evomesh.data.folders import check_folder
from evomesh.data.sources import Record, TextFile, field_text, find_texts, read_records
from evomesh.errors import UserError

WINDOW = 1024  # rows that are shuffled among themselves
TRAIN_WORDS = ("train", "training")
VALID_WORDS = ("validation", "valid", "val", "dev", "test", "testing", "eval")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".7z", ".rar")


def find_rows(folder: str, key: str, subset: str | None, split: str) -> list[TextFile]:
    """Data files of a split, in sorted order.

    A file belongs to "train" or "valid" when a word of its path says so; files without such a word are training data.
    All must be of one kind (parquet, arrow, jsonl, json, txt), else the user is asked which part is meant.

    Args:
        folder: local folder.
        key: config key it came from.
        subset: ``data.subset_name``: a folder or a kind (such as "parquet") inside.
        split: "train" or "valid".

    Raises:
        UserError: nothing found, or more than one kind.
    """
    root = check_folder(folder, key)
    inside = root / subset if subset and (root / subset).is_dir() else root
    archives = [path.name for path in sorted(inside.rglob("*")) if path.name.lower().endswith(ARCHIVES)]
    try:
        files = find_texts([str(inside)])
    except UserError:
        files = []
    kinds = sorted({file.format for file in files})
    if subset and inside == root:
        files = [file for file in files if file.format == subset]
        if not files:
            raise UserError(
                f"{root} has neither a folder nor files of the kind {subset!r}",
                where="data.subset_name",
                expected=f"a folder in it, or one of the kinds found: {', '.join(kinds) or 'none'}",
            )
    words = {file.path: _words(file.path.relative_to(root)) for file in files}
    held = [file for file in files if words[file.path] & set(VALID_WORDS)]
    named = [file for file in files if words[file.path] & set(TRAIN_WORDS) and file not in held]
    other = [file for file in files if file not in held]
    chosen = held if split == "valid" and held else named or other
    if not chosen:
        packed = f"; archives must be unpacked first: {', '.join(archives[:5])}" if archives else ""
        raise UserError(
            f"no {split} file in {inside}{packed}", where=key, expected="parquet, arrow, jsonl, json or txt files"
        )
    kinds = sorted({file.format for file in chosen})
    if len(kinds) > 1:
        counts = ", ".join(f"{sum(file.format == kind for file in chosen)} {kind}" for kind in kinds)
        raise UserError(
            f"{inside} mixes kinds of data: {counts}",
            where=key,
            expected="one of them",
            fix=f'name it: data.subset_name="{kinds[0]}" (or a folder inside)',
        )
    return chosen


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", str(path).lower()))


@dataclass(frozen=True)
class Cursor:
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
class Window:
    """Shuffled rows ``n, n + 1, ..``: their texts and where they stand; and the place behind them."""

    n: int
    texts: list[str]
    places: list[str]
    behind: Cursor


class RowStream:
    """All rows of all files, pass after pass, shuffled inside windows by a generator of (seed, pass, window).

    The shuffle buffer needs no state of its own: a window is a function of its cursor.

    Args:
        files: in order.
        field: column of the text.
        seed: of the shuffles.
    """

    def __init__(self, files: list[TextFile], field: str, seed: int) -> None:
        self.files, self.field, self.seed = files, field, seed

    def windows(self, cursor: Cursor) -> Iterator[Window]:
        """Windows from ``cursor`` on, without end.

        Raises:
            UserError: a file cannot be read, a row lacks the field, or a whole pass holds no text.
        """
        filled = cursor.window > 0
        while True:
            rows = self._rows(cursor.file, cursor.row)
            while block := list(islice(rows, WINDOW)):
                order = np.random.RandomState([self.seed, cursor.epoch, cursor.window]).permutation(len(block))
                texts = [self._text(block[place][0]) for place in order]
                filled = filled or any(texts)
                _, file, row = block[-1]
                behind = replace(cursor, n=cursor.n + len(block), window=cursor.window + 1, file=file, row=row + 1)
                yield Window(cursor.n, texts, [block[place][0].where for place in order], behind)
                cursor = behind
            if not filled:
                raise UserError("no row holds any text", where=str(self.files[0].path.parent))
            cursor = Cursor(n=cursor.n, epoch=cursor.epoch + 1)
            filled = False

    def _rows(self, file: int, row: int) -> Iterator[tuple[Record, int, int]]:
        for number in range(file, len(self.files)):
            first = row if number == file else 0
            for place, record in enumerate(read_from(self.files[number], first), first):
                yield record, number, place

    def _text(self, record: Record) -> str:
        try:
            return field_text(record, self.field)
        except UserError as error:
            error.fix = 'name the column of the text: data.content_name="..."'
            raise UserError(error.found, where=error.where, fix=error.fix) from None


def read_from(file: TextFile, row: int) -> Iterator[Record]:
    """Records of a file from number ``row`` on; row groups of parquet are skipped unread."""
    with file.open() as (stream, _):
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
                    yield Record(value, f"{file.path} row {number}")
