"""Read one token file through its meta, with random access and an exact message for every defect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evomesh.data.token_files.cache import open_cache
from evomesh.data.token_files.file_check import check_file
from evomesh.data.token_files.lines import (
    BadLineError,
    IntArray,
    TokenArray,
    largest_id,
    parse_line,
    parse_ranges,
)
from evomesh.data.token_files.mapping import map_file
from evomesh.data.token_files.meta import read_meta, rebuild
from evomesh.data.token_files.shared_index import digest, shared_array
from evomesh.errors import UserError
from evomesh.quantities import counted

BLOCK = 512  # documents that ``check`` reads at once
BLOCK_BYTES = 2**18  # and about how many bytes at most
SHORT = 128  # average tokens per document below which a cache is read by one gather
LONG = 1 << 16  # tokens from which a document is likely to be in several packs
# Read in a few seconds; ``evomesh data verify`` reads everything.
CHECKED_BYTES = 64 * 2**20

CacheArray = NDArray[np.int32]


class DocumentSource(Protocol):
    """A source of documents with known lengths, which are read by number."""

    name: str
    type_id: int
    lengths: IntArray  # [n], of the documents that are long enough

    def read(self, documents: IntArray) -> TokenArray:
        """Return the tokens of the given documents, one after the other, with their signs as stored."""
        ...


@dataclass
class LongLineCache:
    """The long document that was parsed last, for the next pack inside it; one for all files, to bound memory.

    Attributes:
        found: file, row and tokens, replaced together because several threads read.
    """

    found: tuple[Path, int, TokenArray] = field(
        default_factory=lambda: (Path(), -1, np.empty(0, np.int64))
    )


class BinDataset:
    """The documents of one ``.bin`` file that have at least ``min_length`` tokens.

    Args:
        path: the token file; its ``.meta`` is beside it.
        name: used in reports and messages; "": the path.
        type_id: index of its type folder.
        min_length: shorter documents are left out.
        vocab_size: an id at or above it is refused when it is read; None: not checked.
        last_long: shared by the files that are read together; None: a new one.
        shared: folder in which the processes of a node keep one copy of every array with an entry per document;
            None: each process has its own.

    Raises:
        UserError: the file or its meta is missing or broken; every message names file, row and byte.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = "",
        type_id: int = 0,
        min_length: int = 0,
        vocab_size: int | None = None,
        last_long: LongLineCache | None = None,
        shared: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = name or str(path)
        self.type_id = type_id
        self.vocab_size = vocab_size
        self.size = check_file(self.path)
        self.rows = read_meta(self.path, mapped=shared is not None)
        self._shared = shared
        # Row of each kept document; None: all rows.
        self.kept: NDArray[np.int32] | None = None
        self.lengths: IntArray = self.rows[:, 1]
        has_short = (
            min_length > 0 and len(self.rows) and int(self.lengths.min()) < min_length
        )
        if has_short:
            self._drop_short(min_length)
        self._last_long = last_long or LongLineCache()
        self._mapped: memoryview | None = None
        self._cache = open_cache(self.path, self.tokens)
        self._cache_starts: NDArray[np.int64] | None = None
        self._check_end()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents, short ones included."""
        return int(self.rows[:, 1].sum(dtype=np.int64))

    @property
    def kept_tokens(self) -> int:
        """Number of tokens of the kept documents."""
        return int(self.lengths.sum(dtype=np.int64))

    def _drop_short(self, min_length: int) -> None:
        """Keep only the documents that are long enough."""
        lengths = self.rows[:, 1]
        kept = self._build_once(
            f"{min_length}.kept",
            lambda: np.flatnonzero(lengths >= min_length).astype(np.int32),
        )
        self.kept = kept
        self.lengths = self._build_once(f"{min_length}.lengths", lambda: lengths[kept])

    def _build_once(self, name: str, build: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Build an array that follows from the lengths: once per node with a shared folder, else in this process."""
        if self._shared is None:
            return build()
        lengths = self.rows[:, 1]
        key = f"{digest([lengths])}.{name}"
        return shared_array(self._shared, key, build)

    def row(self, document: int) -> int:
        """Return the row in the meta (line number from 0) of a kept document."""
        if self.kept is None:
            return int(document)
        return int(self.kept[document])

    def line(self, row: int) -> bytes:
        """Return the raw line of a meta row, up to where the next row starts."""
        start = int(self.rows[row, 0])
        end = self.size
        if row + 1 < len(self.rows):
            end = int(self.rows[row + 1, 0])
        content = self._map()
        return bytes(content[start:end])

    def read(self, documents: IntArray) -> TokenArray:
        """Return the tokens of the given kept documents, one after the other; negative ids are inputs but not targets.

        Raises:
            UserError: a line does not match the meta, or an id is outside the vocabulary.
        """
        rows = np.asarray(documents)
        if self.kept is not None:
            rows = self.kept[documents]
        if self._cache is None:
            tokens = self._read_lines(rows)
        else:
            tokens = self._read_cache(rows, self._cache)
        if self.vocab_size is not None and largest_id(tokens) >= self.vocab_size:
            self._refuse_id(rows, tokens)
        return tokens

    def _read_cache(self, rows: IntArray, cache: CacheArray) -> TokenArray:
        starts = self._starts_in_cache()[rows]
        lengths = self._row_lengths(rows)
        are_short = int(lengths.sum()) < len(rows) * SHORT
        read = _gather if are_short else _join_slices
        return read(cache, starts, lengths)

    def _starts_in_cache(self) -> NDArray[np.int64]:
        """Return where each row's tokens start in the cache, which has no index: it has them end to end."""
        if self._cache_starts is None:
            build = partial(_starts, self.rows[:, 1])
            self._cache_starts = self._build_once("starts", build)
        return self._cache_starts

    def _read_lines(self, rows: IntArray) -> TokenArray:
        is_long = self._row_lengths(rows) >= LONG
        if not is_long.any():
            return self._parse(rows)
        # Each long document forms a separate group; the rows between two of them are
        # parsed together. With a long one at position 2 of five, the borders 2 and 3
        # give the groups [0 1], [2] and [3 4].
        long = np.flatnonzero(is_long)
        borders = np.unique([long, long + 1])
        parts = []
        for group in np.split(rows, borders):
            if not len(group):
                continue
            if self._row_lengths(group)[0] >= LONG:
                tokens = self._read_long(group)
            else:
                tokens = self._parse(group)
            parts.append(tokens)
        # A long document alone is shared with the next pack inside it, without a copy.
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_long(self, row: IntArray) -> TokenArray:
        """Read one long document; ``row`` has a single entry."""
        path, last, tokens = self._last_long.found
        if path != self.path or last != int(row[0]):
            tokens = self._parse(row)
            tokens.flags.writeable = False  # handed out more than once
            self._last_long.found = (self.path, int(row[0]), tokens)
        return tokens

    def _parse(self, rows: IntArray) -> TokenArray:
        starts = self._row_offsets(rows)
        ends = self._row_ends(rows)
        lengths = self._row_lengths(rows)
        mapped = self._map()
        tokens = parse_ranges(mapped, starts, ends, lengths)
        if tokens is not None:
            return tokens
        # A line has a defect: find it line by line, to name its row and byte.
        checked = map(self._parse_with_checks, rows.tolist())
        return np.concatenate(list(checked))

    def _row_offsets(self, rows: IntArray) -> NDArray[np.int64]:
        return np.asarray(self.rows[rows, 0], np.int64)

    def _row_ends(self, rows: IntArray) -> NDArray[np.int64]:
        # A line ends where the next one starts, the last one at the end of the file.
        last = len(self.rows) - 1
        next_rows = np.minimum(rows + 1, last)
        ends = self._row_offsets(next_rows)
        ends[rows == last] = self.size
        return ends

    def _row_lengths(self, rows: IntArray) -> NDArray[np.int64]:
        return np.asarray(self.rows[rows, 1], np.int64)

    @property
    def block(self) -> int:
        """Number of documents that ``check`` reads at once."""
        return max(1, min(BLOCK, BLOCK_BYTES * len(self) // self.size))

    @property
    def blocks(self) -> int:
        """Number of blocks of the file."""
        return -(-len(self) // self.block)

    def documents_of_block(self, number: int) -> IntArray:
        """Return the documents that make up a block."""
        start = number * self.block
        return np.arange(start, min(start + self.block, len(self)))

    def check(self, count: int, *, crosses_documents: bool = False) -> tuple[int, int]:
        """Read ``count`` of the ``blocks``, evenly spaced, so that what ``read`` refuses is refused now.

        Args:
            crosses_documents: a document's first token may be the target of the token before it.

        Returns:
            The number of tokens read, and of those among them that can be targets.

        Raises:
            UserError: as ``read``; or the whole file was read, and it has no target.
        """
        tokens = 0
        targets = 0
        for number in evenly_spaced(self.blocks, count).tolist():
            documents = self.documents_of_block(number)
            ids = self.read(documents)
            lengths = None
            if not crosses_documents:
                lengths = self.lengths[documents]
            tokens += len(ids)
            targets += count_targets(ids, lengths)
        # A few blocks without a target prove nothing: the others may have one.
        read_everything = tokens == self.kept_tokens
        if tokens and read_everything and not targets:
            raise without_target(tokens, str(self.path))
        return tokens, targets

    def _map(self) -> memoryview:
        """Return the mapped file; it is mapped at first use, so that a run opens only the files it reads."""
        if self._mapped is None:
            self._mapped = map_file(self.path)
        return self._mapped

    def _parse_with_checks(self, row: int) -> TokenArray:
        """Parse one line with every check, for an exact message."""
        # 1. The meta: does the row cover exactly one line?
        line = self.line(row)
        start, declared = self.rows[row].tolist()
        has_frame = line.startswith(b"{") and line.endswith((b"\n", b"}"))
        if not has_frame or line.count(b"\n", 0, len(line) - 1):
            self._refuse_offset(row, line)
        # 2. The line itself, and the count of its tokens.
        try:
            tokens = parse_line(line)
        except BadLineError as bad:
            raise UserError(
                bad.found,
                where=bad.location(self.path, row + 1, start),
                expected=bad.expected,
                fix=f"list every bad line: evomesh data verify {self.path}",
                code="EVO-DATA-005",
            ) from None
        if len(tokens) != declared:
            raise UserError(
                f"the meta declares {declared} tokens, the line has {len(tokens)}",
                where=f"{self.path} line {row + 1} (meta row {row}, byte {start})",
                fix=rebuild(self.path),
                code="EVO-DATA-004",
            )
        return np.array(tokens, dtype=np.int64)

    def _refuse_offset(self, row: int, line: bytes) -> None:
        """Refuse an offset that is not the start of a line, or missing rows; return if the line itself is bad."""
        start = int(self.rows[row, 0])
        for wrong, offset in ((row, start), (row + 1, start + len(line))):
            before, after = self._line_around(offset)
            if offset not in (before, self.size):
                raise UserError(
                    f"offset {offset} is not the start of a line",
                    where=f"{self.path}.meta row {wrong}",
                    expected=f"nearest line starts: byte {before} and byte {after}",
                    fix=rebuild(self.path),
                    code="EVO-DATA-004",
                )
        if inner := line.count(b"\n", 0, len(line) - 1):
            raise UserError(
                f"there are {inner + 1} lines between this row and the next: the meta lacks rows",
                where=f"{self.path}.meta row {row} (byte {start})",
                fix=rebuild(self.path),
                code="EVO-DATA-004",
            )

    def _line_around(self, offset: int) -> tuple[int, int]:
        """Return start and end of the line that contains byte ``offset``."""
        start = end = 0
        with self.path.open("rb") as file:
            while end <= offset and (line := file.readline()):
                start, end = end, end + len(line)
        return start, end

    def _refuse_id(self, rows: IntArray, tokens: TokenArray) -> None:
        """Refuse the first id of the documents in ``rows`` that is outside the vocabulary."""
        is_outside = np.abs(tokens) >= self.vocab_size
        first_bad = int(np.flatnonzero(is_outside)[0])
        starts = _starts(self._row_lengths(rows))
        document = int(np.searchsorted(starts, first_bad, side="right")) - 1
        position = first_bad - int(starts[document])
        raise UserError(
            f"token {position} is {int(tokens[first_bad])}, outside the vocabulary",
            where=f"{self.path} line {int(rows[document]) + 1}",
            expected=f"ids below model.vocab_size={self.vocab_size}",
            fix="set model.vocab_size to the tokenizer's size, or tokenize with the model's tokenizer",
            code="EVO-DATA-006",
        )

    def _check_end(self) -> None:
        """Check that the last row's line is the last of the file: a cheap test for a torn file and for missing rows."""
        if not len(self.rows):
            raise UserError(
                "the meta has no rows",
                where=f"{self.path}.meta",
                fix=rebuild(self.path),
                code="EVO-DATA-004",
            )
        last = len(self.rows) - 1
        line = self.line(last)
        extra = line.rstrip(b"\n").count(b"\n")
        if extra:
            raise UserError(
                f"the meta has {counted(len(self.rows), 'row')}, the token file has "
                f"{counted(extra, 'more line')} after the last of them",
                where=f"{self.path}.meta",
                fix=rebuild(self.path),
                code="EVO-DATA-004",
            )
        if not line.rstrip().endswith(b"}"):
            start = int(self.rows[last, 0])
            raise UserError(
                f"the token file ends at byte {self.size} in the middle of a line",
                where=f"{self.path} line {last + 1} (starts at byte {start})",
                expected=f"a complete line; the last good one is line {last}"
                if last
                else "a complete line",
                fix=f"drop the torn line: evomesh data repair {self.path}",
                code="EVO-DATA-005",
            )


def _starts(lengths: IntArray) -> NDArray[np.int64]:
    """Return where each document starts when documents of these lengths follow one another."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def _gather(cache: CacheArray, starts: TokenArray, lengths: TokenArray) -> TokenArray:
    """Read short documents by one index of every token, which is cheaper than a slice of every document."""
    # Documents of 2 and 3 tokens that start at 10 and 40 in the cache are the tokens
    # [0 1 2 3 4] of the result: [0 1 2 3 4] + [10 10 38 38 38] = [10 11 40 41 42].
    offsets = starts - _starts(lengths)
    index = np.arange(lengths.sum()) + np.repeat(offsets, lengths)
    tokens: TokenArray = cache[index].astype(np.int64)
    return tokens


def _join_slices(
    cache: CacheArray, starts: TokenArray, lengths: TokenArray
) -> TokenArray:
    """Read documents by a slice of each."""
    borders = np.stack([starts, starts + lengths], axis=1)
    parts = [cache[start:end] for start, end in borders.tolist()]
    return np.concatenate(parts).astype(np.int64)


def evenly_spaced(total: int, count: int) -> NDArray[np.int64]:
    """Return ``count`` evenly spaced numbers from 0 to ``total`` - 1, or all of these if there are fewer."""
    spaced = np.linspace(0, total - 1, min(count, total))
    numbers = spaced.astype(np.int64)
    return np.unique(numbers)


def count_targets(ids: TokenArray, lengths: IntArray | None = None) -> int:
    """Return how many ids of documents can be targets: the positive ones.

    Args:
        ids: the ids of the documents, concatenated.
        lengths: of the documents; the first token of each is then not a target, since
            nothing precedes it. None: every token has a predecessor.
    """
    is_target = ids > 0
    if lengths is not None:
        not_empty = lengths[lengths > 0]
        is_target[_starts(not_empty)] = False
    return int(is_target.sum())


def check_sources(
    sources: Sequence[DocumentSource], *, crosses_documents: bool = False
) -> None:
    """Read token files before a run starts: completely if together they are small, else in evenly spaced blocks.

    The blocks find defects that occur throughout a file, such as another vocabulary or
    the meta of another file.

    Args:
        crosses_documents: as for ``BinDataset.check``.

    Raises:
        UserError: the first bad line or meta row that was read; training would have failed on it later. Or a file
            without a single target, or no target in anything that was read.
    """
    files = [source for source in sources if isinstance(source, BinDataset)]
    total_bytes = sum(file.size for file in files)
    share = min(1.0, CHECKED_BYTES / max(1, total_bytes))
    due = 0.0  # blocks to read; the fraction is carried over, so that many small files are not all skipped
    tokens = 0
    targets = 0
    for file in files:
        due += file.blocks * share
        tokens_of_file, targets_of_file = file.check(
            int(due), crosses_documents=crosses_documents
        )
        due -= int(due)
        tokens += tokens_of_file
        targets += targets_of_file
    if tokens and not targets:
        raise without_target(tokens, f"{len(files)} files, such as {files[0].path}")


def without_target(tokens: int, where: str) -> UserError:
    """Return the error for documents that have no target."""
    return UserError(
        f"none of {tokens:,} tokens is a target: every id is negative (masked), 0, or the first of its document",
        where=where,
        expected="documents with positive ids, which the loss counts",
        fix="check which roles were trained on when the conversations were tokenized (--train-on), and that documents "
        "are longer than one token",
        code="EVO-DATA-015",
    )
