"""The documents that a survey reads: of token files, or of raw text files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from evomesh.config.user import expand_home
from evomesh.data.records.reader import read_records, record_text
from evomesh.data.records.source_files import (
    SourceFile,
    find_source_files,
    list_source_files,
    open_files,
)
from evomesh.data.survey.scripts import words_of
from evomesh.data.token_files.bin_dataset import BinDataset, evenly_spaced
from evomesh.data.token_files.folders import find_bins, walk
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

BYTES_PER_TOKEN = 4  # of text, where a number of tokens has to be guessed
ENCODED_TOGETHER = 64  # texts
Units = NDArray[np.int64]


@dataclass(frozen=True)
class SurveyDocument:
    """A document as a survey sees it.

    Attributes:
        type: type of its file.
        place: for people, file and line of a text, FILE:ROW of a token file as `evomesh ledger` takes it.
        units: ids of its tokens, or without a tokenizer hashes of its words.
        masked: tokens among them that are not targets.
        text: None for documents of token files.
    """

    type: str
    place: str
    units: Units
    masked: int = 0
    text: str | None = None

    @property
    def content(self) -> bytes:
        """The text, or the ids without their signs: equal for equal documents only."""
        if self.text is not None:
            return self.text.encode("utf-8", "surrogatepass")
        return np.ascontiguousarray(self.units, "<i8").tobytes()


class TokenFolder:
    """The documents of token files.

    Args:
        path: a ``.bin`` file, or a folder.
        max_tokens: about how many tokens are read; 0: all.

    Attributes:
        sources: the files, with all of their documents.
    """

    has_tokens = True

    def __init__(self, path: str, max_tokens: int) -> None:
        self._open(path)
        tokens = sum(source.tokens for source in self.sources)
        self.tokens = tokens
        self.is_complete = max_tokens == 0 or tokens <= max_tokens
        share = 1.0
        if not self.is_complete:
            share = max_tokens / tokens
        self._select(share)

    def _open(self, path: str) -> None:
        """Open the file, or all files of the folder."""
        is_folder = expand_home(path).is_dir()
        sources = []
        types = []
        rows = []
        for file in find_bins(path):
            source = BinDataset(file.path, name=file.name)
            kind = file.type
            if not is_folder:
                kind = file.path.name
            row = file_row(file.name, kind, source.size)
            sources.append(source)
            types.append(kind)
            rows.append(row)
        self.sources = sources
        self.types = types
        self.files = rows

    def _select(self, share: float) -> None:
        """Choose the documents that are read."""
        self._selected = [_selected(source, share) for source in self.sources]
        counts = [len(numbers) for numbers in self._selected]
        self._first = np.cumsum([0, *counts])  # number of each file's first document

    def lengths_of(self, kind: str) -> NDArray[np.int64]:
        """Return the lengths of all documents of a type."""
        parts = []
        for source, its_kind in zip(self.sources, self.types, strict=True):
            if its_kind == kind:
                parts.append(source.lengths)
        return np.concatenate(parts).astype(np.int64)

    @property
    def share(self) -> float:
        """Share of the documents that is read."""
        total = sum(len(source) for source in self.sources)
        return float(self._first[-1] / max(1, total))

    def documents(self) -> Iterator[SurveyDocument]:
        """Yield the documents that are read, file by file."""
        for number, selected in enumerate(self._selected):
            block = self.sources[number].block
            for start in range(0, len(selected), block):
                yield from self._read(number, selected[start : start + block])

    def _read(self, number: int, rows: NDArray[np.int64]) -> Iterator[SurveyDocument]:
        source = self.sources[number]
        stored = source.read(rows)
        lengths = source.lengths[rows]
        ends = np.cumsum(lengths)
        parts = np.split(stored, ends[:-1])
        for place, ids in enumerate(parts):
            masked = np.count_nonzero(ids < 0)
            yield SurveyDocument(
                type=self.types[number],
                place=f"{source.name}:{rows[place]}",
                units=np.abs(ids),
                masked=int(masked),
            )

    def pick(self, numbers: Sequence[int]) -> dict[int, SurveyDocument]:
        """Return documents by their numbers among those that are read."""
        return {number: self._pick(number) for number in numbers}

    def _pick(self, number: int) -> SurveyDocument:
        not_after = np.searchsorted(self._first, number, side="right")
        file = int(not_after) - 1
        place = number - self._first[file]
        row = self._selected[file][place]
        (document,) = self._read(file, np.array([row]))
        return document


def file_row(name: str, kind: str, size: int) -> dict[str, object]:
    """Return what the page shows of a file."""
    return {"file": name, "type": kind, "bytes": size}


def _selected(source: BinDataset, share: float) -> NDArray[np.int64]:
    wanted = max(1, round(len(source) * share))
    return evenly_spaced(len(source), wanted)


@dataclass
class TextFolder:
    """The documents of raw files: jsonl, json, csv, txt, parquet and arrow, also compressed or in archives.

    Attributes:
        path: a file or a folder.
        text_field: of a record, which holds the text.
        tokenizer: encodes the texts; None: units are hashes of words.
        max_tokens: about how many tokens are read; 0: all. Of a large folder these are the first of every file.
        is_complete: whether the last pass read all files to their ends.
    """

    path: str
    text_field: str
    tokenizer: Tokenizer | None
    max_tokens: int
    files: list[dict[str, object]] = dataclasses.field(default_factory=list)
    is_complete: bool = True

    def __post_init__(self) -> None:
        self.sources = find_source_files([self.path])
        for source in self.sources:
            row = file_row(self._name(source), self._type(source), source.size)
            self.files.append(row)

    @property
    def has_tokens(self) -> bool:
        """Tell whether units are ids of tokens."""
        return self.tokenizer is not None

    @property
    def share(self) -> float | None:
        """Share of the documents that was read; what a file holds past its part is not known."""
        return 1.0 if self.is_complete else None

    def _name(self, source: SourceFile) -> str:
        root = expand_home(self.path)
        if root.is_dir():
            return source.full_path.relative_to(root).as_posix()
        return source.full_path.name

    def _type(self, source: SourceFile) -> str:
        """Return the first folder of its name, as of token files; a file without one is its own type."""
        return Path(self._name(source)).parts[0]

    def documents(self) -> Iterator[SurveyDocument]:
        """Yield the documents that are read, file by file."""
        self.is_complete = True
        batch: list[tuple[SourceFile, str, str]] = []
        for found in self._texts():
            batch.append(found)
            if len(batch) == ENCODED_TOGETHER:
                yield from self._survey(batch)
                batch = []
        yield from self._survey(batch)

    def _texts(self) -> Iterator[tuple[SourceFile, str, str]]:
        """Yield file, place and text of the first documents of each file, as many as its size allows."""
        for source, stream, _ in open_files(self.sources):
            left = self._allowed_bytes(source)
            path = str(source.full_path)
            name = self._name(source)
            for record in read_records(stream, source):
                if left <= 0:
                    self.is_complete = False
                    break
                text = record_text(record, self.text_field)
                left -= utf8_size(text)
                place = record.where.removeprefix(path)
                yield source, name + place, text

    def _allowed_bytes(self, source: SourceFile) -> float:
        """Return how many bytes of a file's texts are read: its share of all, by its size."""
        if not self.max_tokens:
            return math.inf
        total = sum(source.size for source in self.sources)
        share = source.size / max(1, total)
        return share * self.max_tokens * BYTES_PER_TOKEN

    def _survey(
        self, batch: Sequence[tuple[SourceFile, str, str]]
    ) -> Iterator[SurveyDocument]:
        texts = [text for _, _, text in batch]
        units = self._units(texts)
        for number, (source, place, text) in enumerate(batch):
            yield SurveyDocument(
                type=self._type(source),
                place=place,
                units=units[number],
                text=text,
            )

    def _units(self, texts: list[str]) -> list[Units]:
        if self.tokenizer is None:
            return [word_hashes(text) for text in texts]
        encoded = self.tokenizer.encode_batch(texts)
        return [np.array(ids, np.int64) for ids in encoded]

    def pick(self, numbers: Sequence[int]) -> dict[int, SurveyDocument]:
        """Return documents by their numbers among those that are read, which is another pass."""
        wanted = set(numbers)
        picked: dict[int, SurveyDocument] = {}
        if not wanted:
            return picked
        for number, document in enumerate(self.documents()):
            if number in wanted:
                picked[number] = document
                if len(picked) == len(wanted):
                    break
        return picked


def utf8_size(text: str) -> int:
    """Return the bytes of a text, in which there may be half of a surrogate pair."""
    return len(text.encode("utf-8", "surrogatepass"))


def word_hashes(text: str) -> Units:
    """Return a hash of each word, without its case."""
    hashes = [
        xxhash.xxh3_64_intdigest(word.encode()) for word in words_of(text.lower())
    ]
    return np.array(hashes, np.uint64).view(np.int64)


def open_folder(
    path: str, text_field: str, tokenizer: Tokenizer | None, max_tokens: int
) -> TokenFolder | TextFolder:
    """Open the token files of a path, or if there is none its raw text files.

    Raises:
        UserError: there is neither.
    """
    root = expand_home(path)
    if root.is_dir():
        has_bins = next(walk(root, ".bin"), None) is not None
        if not has_bins and not list_source_files(root):
            raise UserError(
                "no token file and no text file below the folder",
                where=str(root),
                expected="TYPE/NAME.bin with its .meta, or jsonl, json, csv, txt, parquet or arrow files",
                code="EVO-DATA-002",
            )
    else:
        has_bins = root.suffix == ".bin"
    if has_bins or not root.exists():
        return TokenFolder(path, max_tokens)
    return TextFolder(path, text_field, tokenizer, max_tokens)
