"""Read the rows of a Hugging Face style folder in order, from any position."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from evomesh.config.hub_folders import advice_on_missing, cache_folder, cached_dataset
from evomesh.data.records.reader import SourceRecord, read_records, record_text
from evomesh.data.records.source_files import (
    FORMATS,
    SourceFile,
    list_source_files,
    open_files,
)
from evomesh.data.records.splits import (
    ALL_SPLITS,
    HELD_OUT_KINDS,
    SHARD_NAME,
    choose_split,
    read_saved_splits,
    split_kind,
    split_of,
    usual_name,
)
from evomesh.data.token_files.folders import check_folder
from evomesh.errors import UserError
from evomesh.quantities import counted

WINDOW = 1024  # rows that are shuffled among themselves
WINDOW_CHARS = 1 << 28  # of a window's texts, which are in memory together
TEXT_FOLDER = "a folder of text files (parquet, json, jsonl, csv, txt), or the id of a downloaded dataset"
PREFERRED = ("parquet", "arrow", "json", "csv", "txt")  # among equally many files


def find_text_folder(name: str, key: str) -> Path:
    """Return the folder that a path names, or the id of a dataset in the local hub cache.

    Raises:
        UserError: there is neither; a hub id is answered with the command that downloads it.
    """
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")
    if not is_hub_id or Path(name).exists():
        return check_folder(name, key, TEXT_FOLDER)
    cached = cached_dataset(name)
    if cached is None:
        raise UserError(
            f"no folder {name}, and no dataset of this name in the hub cache {cache_folder()}",
            where=key,
            expected=TEXT_FOLDER,
            fix=advice_on_missing(name, "dataset", " --repo-type dataset"),
            code="EVO-DATA-001",
        )
    return cached


def find_split_files(
    folder: str,
    key: str,
    subset: str | None,
    purpose: str,
    split: str | None = None,
) -> tuple[list[SourceFile], list[str]]:
    """Find the data files of one split, in sorted order, and the warnings that a user should read.

    Args:
        folder: local folder, or id of a dataset in the local hub cache.
        key: the config key that names the folder, for messages.
        subset: ``data.subset_name``: a folder or archive inside, or a format (such as "parquet").
        purpose: "train" or "valid".
        split: name of the split; None: the one that ``purpose`` implies, if that is unambiguous.

    Raises:
        UserError: there are no files, the choice of the split is ambiguous, or an archive is damaged.
    """
    # 1. The files below the folder that belong to the subset.
    root = find_text_folder(folder, key)
    names = _list_names(root, key)
    files = _select_subset(names, subset, root)

    # 2. Those of the split.
    splits = _find_splits(files, names, subset, split, root)
    distinct = set(splits.values())
    chosen = choose_split(sorted(distinct), split, purpose, root)
    selected = []
    for file, split_of_file in splits.items():
        if chosen == ALL_SPLITS or split_of_file == chosen:
            selected.append(file)

    # 3. Those of one format, and what a user might not expect of the choice.
    selected, warnings = _choose_format(selected, root)
    split_is_implied = purpose == "train" and split is None
    if split_is_implied:
        split_of_name = {}
        for file, split_of_file in splits.items():
            name = names[file]
            split_of_name[name] = split_of_file
        left_out = _warn_left_out(split_of_name, chosen)
        warnings.extend(left_out)
    return selected, warnings


def _list_names(root: Path, key: str) -> dict[SourceFile, Path]:
    """Return the files below a folder with their names relative to it."""
    names = {file: file.full_path.relative_to(root) for file in list_source_files(root)}
    if not names:
        raise UserError(
            f"no data file in {root}",
            where=key,
            expected=f"{', '.join(FORMATS)} files, or .tar, .tar.gz or .zip archives of them",
            code="EVO-DATA-002",
        )
    return names


def _select_subset(
    names: Mapping[SourceFile, Path], subset: str | None, root: Path
) -> list[SourceFile]:
    """Return the files of a format, or inside a folder or archive; all of them without a subset."""
    if subset is None:
        return list(names)
    files = []
    for file, name in names.items():
        is_inside = Path(subset) in name.parents
        if file.format == subset or is_inside:
            files.append(file)
    if files:
        return files

    formats = sorted({file.format for file in names})
    choices = f"one of the formats {', '.join(formats)}"
    inside = [name for name in names.values() if len(name.parts) > 1]
    folders = sorted({name.parts[0] for name in inside})
    if folders:
        choices += f", or one of {', '.join(folders[:8])}"
    raise UserError(
        f"{root} has no folder or archive {subset!r} and no files of that format",
        where="data.subset_name",
        expected=choices,
        code="EVO-DATA-016",
    )


def _find_splits(
    files: Sequence[SourceFile],
    names: Mapping[SourceFile, Path],
    subset: str | None,
    wanted: str | None,
    root: Path,
) -> dict[SourceFile, str]:
    """Return the files that make up the dataset, each with its split: the shards of the Hub's layout, else all.

    Args:
        wanted: a split that the user named; where no shard is of it, other files may be.
    """
    saved = read_saved_splits(root)
    every = {file: split_of(names[file], saved) for file in files}
    shards = {
        file: name for file, name in every.items() if _is_shard(names[file], subset)
    }
    if wanted is not None and usual_name(wanted) not in shards.values():
        return every
    return shards or every


def _is_shard(name: Path, subset: str | None) -> bool:
    """Return whether a file is a shard of the Hub's layout, ``data/SPLIT-00000-of-00002.parquet``.

    Where a folder has such shards, they are the dataset, and what is beside them is not:
    copies in other formats, archives of the same texts, readmes.
    """
    tops = [Path("data")]
    if subset is not None:
        tops.append(Path(subset) / "data")
    return name.parent in tops and SHARD_NAME.match(name.name) is not None


def _choose_format(
    files: Sequence[SourceFile], root: Path
) -> tuple[list[SourceFile], list[str]]:
    """Return the files of the most frequent format, as ``datasets`` does, and a warning if there are others.

    What is inside an archive was put there together, and is all read.
    """
    plain_files = [file for file in files if file.member is None]
    counts = Counter(map(_reader, plain_files))
    if len(counts) < 2:
        return list(files), []

    # Of equally many files, those of the format that is first in PREFERRED: ``max``
    # returns the first of equals.
    formats = sorted(counts, key=PREFERRED.index)
    main = max(formats, key=counts.__getitem__)
    listed = ", ".join(f"{counts[reader]} {reader}" for reader in sorted(counts))
    warning = (
        f"{root} mixes formats ({listed}); only the {main} files are read; "
        "set data.subset_name to choose another"
    )
    kept = [file for file in files if file.member or _reader(file) == main]
    return kept, [warning]


def _reader(file: SourceFile) -> str:
    """Return the format, or "json" for both kinds of JSON, which make up one dataset."""
    return "json" if file.format == "jsonl" else file.format


def _warn_left_out(split_of_name: Mapping[Path, str], chosen: str) -> list[str]:
    """Name the files that training does not read.

    Args:
        split_of_name: split of each file.
        chosen: the split that is read.
    """
    left_out = {name: split for name, split in split_of_name.items() if split != chosen}
    warnings = []
    unnamed = [name for name, split in left_out.items() if not split_kind(split)]
    if unnamed:
        warnings.append(
            f"left out: {counted(len(unnamed), 'file')} such as {unnamed[0]}, because other files are named {chosen}; "
            f'data.split_name="{ALL_SPLITS}" reads all files'
        )
    held_out = [
        name for name, split in left_out.items() if split_kind(split) in HELD_OUT_KINDS
    ]
    if held_out:
        warnings.append(
            f"left out: {counted(len(held_out), 'file')} such as {held_out[0]}, for a name with "
            f'{left_out[held_out[0]]}; data.split_name="{ALL_SPLITS}" reads all files'
        )
    return warnings


@dataclass(frozen=True)
class RowCursor:
    """A position between two windows of the endless sequence of rows; stored in checkpoints.

    Attributes:
        n: rows before it, over all passes.
        epoch: finished passes.
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
    """A window of shuffled rows.

    Attributes:
        first_row: number of rows before the window, over all passes.
        texts: text of each row.
        locations: file and line of each row, for messages.
        next_cursor: the position after the window.
    """

    first_row: int
    texts: list[str]
    locations: list[str]
    next_cursor: RowCursor


class RowStream:
    """All rows of all files, pass after pass, shuffled inside windows.

    The shuffle is stateless: its generator is seeded with (seed, pass, window), so that
    a window is a function of its cursor.

    Args:
        files: in order.
        field: column of the text.
        seed: seed of the shuffles.
    """

    def __init__(self, files: list[SourceFile], field: str, seed: int) -> None:
        self.files = files
        self.field = field
        self.seed = seed

    def windows(self, cursor: RowCursor) -> Iterator[RowWindow]:
        """Yield windows from ``cursor`` on, endlessly.

        Raises:
            UserError: a file cannot be read, a row lacks the field, or a whole pass contains no text.
        """
        found_text = cursor.window > 0
        while True:
            rows = self._rows(cursor.file, cursor.row)
            while block := self._take_window(rows):
                window = self._shuffle(block, cursor)
                found_text = found_text or any(window.texts)
                yield window
                cursor = window.next_cursor
            if not found_text:
                raise UserError(
                    "no row contains any text",
                    where=str(self.files[0].path.parent),
                    code="EVO-DATA-007",
                )
            cursor = RowCursor(n=cursor.n, epoch=cursor.epoch + 1)
            found_text = False

    def _take_window(
        self, rows: Iterator[tuple[SourceRecord, int, int]]
    ) -> list[tuple[SourceRecord, int, int]]:
        """Return the next rows: ``WINDOW``, or fewer where their texts are very long."""
        block = []
        chars = 0
        for row in islice(rows, WINDOW):
            block.append(row)
            chars += _text_length(row[0], self.field)
            if chars >= WINDOW_CHARS:
                break
        return block

    def _shuffle(
        self, block: Sequence[tuple[SourceRecord, int, int]], cursor: RowCursor
    ) -> RowWindow:
        """Return the window at ``cursor``, which has the rows of ``block``."""
        generator = np.random.RandomState([self.seed, cursor.epoch, cursor.window])
        records = [block[index][0] for index in generator.permutation(len(block))]
        _, last_file, last_row = block[-1]
        next_cursor = replace(
            cursor,
            n=cursor.n + len(block),
            window=cursor.window + 1,
            file=last_file,
            row=last_row + 1,
        )
        return RowWindow(
            first_row=cursor.n,
            texts=[self._text(record) for record in records],
            locations=[record.where for record in records],
            next_cursor=next_cursor,
        )

    def _rows(self, file: int, row: int) -> Iterator[tuple[SourceRecord, int, int]]:
        """Yield each record from a position on, with the numbers of its file and row."""
        files = self.files[file:]
        for opened, stream, _ in open_files(files):
            records = read_records_from(stream, opened, row)
            for record in records:
                yield record, file, row
                row += 1
            # Only the first file is entered in the middle.
            file += 1
            row = 0

    def _text(self, record: SourceRecord) -> str:
        try:
            return record_text(record, self.field)
        except UserError as error:
            if isinstance(record.value, dict) and self.field not in record.value:
                fix = 'name the text column: data.content_name="..."'
                raise UserError(
                    error.found, where=error.where, fix=fix, code=error.code
                ) from None
            raise


def _text_length(record: SourceRecord, field: str) -> int:
    """Return the number of characters of a record's text, 0 where it has none."""
    value = record.value
    text = value.get(field) if isinstance(value, dict) else value
    return len(text) if isinstance(text, str) else 0


def read_records_from(
    stream: IO[bytes], file: SourceFile, row: int
) -> Iterator[SourceRecord]:
    """Yield the records of an opened file from number ``row`` on; row groups of parquet are skipped unread."""
    if file.format != "parquet" or row == 0:
        yield from islice(read_records(stream, file), row, None)
        return
    import pyarrow.parquet

    parquet: Any = pyarrow.parquet.ParquetFile(stream)
    group = 0
    number = 0  # rows before the group, then rows read so far
    while group < parquet.num_row_groups:
        group_rows = parquet.metadata.row_group(group).num_rows
        if number + group_rows > row:
            break
        number += group_rows
        group += 1
    for batch in parquet.iter_batches(
        WINDOW, row_groups=list(range(group, parquet.num_row_groups))
    ):
        for value in batch.to_pylist():
            number += 1
            if number > row:
                yield SourceRecord(value, f"{file.full_path} row {number}")
