"""Go from the text files of a config to tokenized documents, for training and validation alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from evomesh.config.data import DataConfig
from evomesh.data.packing.validation import MemoryDocuments
from evomesh.data.prepare.tokenize import (
    BATCH_CHARS,
    TextOptions,
    boundary_ids,
    utf8_length,
)
from evomesh.data.records.encodings import check_encoding
from evomesh.data.records.rows import RowCursor, RowStream, find_split_files
from evomesh.data.records.source_files import SourceFile
from evomesh.data.token_files.bin_dataset import count_targets, without_target
from evomesh.data.token_files.lines import TokenArray, largest_id
from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.errors import UserError

MANY_ROWS = 100_000  # unused rows, one after the other, that end a run after a pass


@dataclass
class UnusedRows:
    """Ends a run whose rows are all too short or without a target, which would read its data again and again.

    Attributes:
        start: where the pass began that is being read.
        rows: rows since the last document with a target.
        longest: tokens of the longest of them.
        tokens: tokens of those of them that were long enough.
    """

    start: RowCursor
    rows: int = 0
    longest: int = 0
    tokens: int = 0

    def add(self, tokens: int, *, is_document: bool = False) -> None:
        """Count a row that gave no target; ``is_document``: it was long enough."""
        self.rows += 1
        self.longest = max(self.longest, tokens)
        if is_document:
            self.tokens += tokens

    def end_window(self, after: RowCursor, targets: int, min_length: int) -> None:
        """Record that a window has been read, and how many targets it had.

        Raises:
            UserError: whole passes gave none. A rank reads other rows in each pass, so it waits until it has seen as
                many rows as a pass has, or very many.
        """
        if targets:
            self.rows = self.longest = self.tokens = 0
        if after.epoch == self.start.epoch:
            return
        rows_of_pass = after.n - self.start.n
        self.start = after
        if self.rows < min(rows_of_pass, MANY_ROWS) or not self.rows:
            return
        if self.tokens:
            raise without_target(self.tokens, "data.train_folder")
        raise self.too_short("data.train_folder", "data.min_length", min_length)

    def too_short(self, where: str, key: str, min_length: int) -> UserError:
        """Return the error for rows of which none has ``key`` = ``min_length`` tokens."""
        return UserError(
            f"none of {self.rows:,} rows has {key}={min_length} tokens, the longest has {self.longest}",
            where=where,
            expected="at least one row that is long enough",
            fix=f"lower {key} to {self.longest} or less, or add longer texts",
            code="EVO-DATA-018",
        )


def find_text_files(
    config: DataConfig, purpose: Literal["train", "valid"]
) -> tuple[list[SourceFile], list[str]]:
    """Return the files to train or validate on, in the encoding of the config, and warnings."""
    key = f"data.{purpose}_folder"
    encoding = check_encoding(config.encoding, "data.encoding")
    folder = config.train_folder
    split = config.split_name
    if purpose == "valid":
        folder = config.valid_folder
        split = config.valid_split_name
    assert folder is not None
    files, warnings = find_split_files(folder, key, config.subset_name, purpose, split)
    return [replace(file, encoding=encoding) for file in files], warnings


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield the ids of texts, which are encoded in batches: the library's own form of a token is large."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield from tokenizer.encode_batch(batch)
            batch = []
            chars = 0
    yield from tokenizer.encode_batch(batch)


def load_text_tokenizer(config: DataConfig) -> Tokenizer:
    assert config.tokenizer_path is not None  # config/rules.py
    return load_tokenizer(config.tokenizer_path, "data.tokenizer_path")


def text_boundary_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids before and after every text: those of ``evomesh tokenize``, without an eos if there is none."""
    return boundary_ids(tokenizer, TextOptions(eos=tokenizer.eos_id is not None))


def check_ids(largest: int, vocab_size: int, tokenizer: Tokenizer, where: str) -> None:
    if largest >= vocab_size:
        raise UserError(
            f"token id {largest} is outside the model's vocabulary",
            where=where,
            expected=f"ids below model.vocab_size={vocab_size}",
            fix=f"set model.vocab_size to at least {tokenizer.vocab_size}, the tokenizer's",
            code="EVO-DATA-006",
        )


def read_documents(config: DataConfig, vocab_size: int) -> MemoryDocuments:
    """Read and tokenize all documents of ``data.valid_folder``.

    Raises:
        UserError: there is no file, no text, no document that is long enough or no target, or an id is outside the
            vocabulary.
    """
    # 1. Tokenize the texts.
    files, _ = find_text_files(config, "valid")
    tokenizer = load_text_tokenizer(config)
    prefix, suffix = text_boundary_ids(tokenizer)
    min_length = max(1, config.valid_min_length)
    documents: list[TokenArray] = []
    unused = UnusedRows(RowCursor())
    rows = RowStream(files, config.content_name, config.seed)
    text_bytes = 0
    for ids, length in _encode_first_pass(rows, tokenizer):
        with_ends = prefix + ids + suffix
        document = np.array(with_ends, np.int64)
        if len(document) < min_length:
            unused.add(len(document))
        else:
            documents.append(document)
            text_bytes += length
    if not documents:
        raise unused.too_short("data.valid_folder", "data.valid_min_length", min_length)

    # 2. Check what training would only find in the middle of a run.
    largest = -1
    targets = 0
    tokens = 0
    for document in documents:
        largest = max(largest, largest_id(document))
        # The first token of a document has no predecessor.
        targets += count_targets(document[1:])
        tokens += len(document)
    check_ids(largest, vocab_size, tokenizer, str(config.valid_folder))
    if not targets:
        raise without_target(tokens, "data.valid_folder")
    folder = files[0].path.parent
    return MemoryDocuments(folder.name, documents, text_bytes)


def _encode_first_pass(
    rows: RowStream, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], int]]:
    """Yield the ids of every text once, with the bytes of the text."""
    for window in rows.windows(RowCursor()):
        if window.next_cursor.epoch:  # the first pass is over
            return
        texts = [text for text in window.texts if text]
        yield from zip(
            encode_texts(tokenizer, texts), map(utf8_length, texts), strict=True
        )
