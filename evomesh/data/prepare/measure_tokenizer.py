"""Measure how a tokenizer encodes texts: bytes per token by kind of text, and the differences between two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import ne

from evomesh.config.user import expand_home
from evomesh.data.prepare.train_tokenizer import read_texts
from evomesh.data.records.source_files import SourceFile, find_source_files
from evomesh.data.tokenizer import Tokenizer

BATCH = 256  # texts encoded at once


@dataclass
class Measurement:
    """Counts over the texts of one kind.

    Attributes:
        kind: the folder that the files are in, or the file's name.
        tokens: one count per tokenizer.
        lossy: texts that decoding does not restore, one count per tokenizer.
    """

    kind: str
    texts: int
    size: int
    tokens: list[int]
    lossy: list[int]

    @property
    def bytes_per_token(self) -> list[float]:
        return [self.size / max(1, tokens) for tokens in self.tokens]


def measure(
    inputs: Sequence[str],
    text_field: str,
    tokenizers: Sequence[Tokenizer],
    encoding: str = "utf-8",
) -> list[Measurement]:
    """Encode and decode every text with each tokenizer.

    Returns:
        One row per kind of text, in the order of the inputs.

    Raises:
        UserError: an input cannot be read.
    """
    return [
        _measure_kind(kind, files, text_field, tokenizers)
        for kind, files in _kinds(inputs, encoding)
    ]


def _kinds(
    inputs: Sequence[str], encoding: str
) -> Iterator[tuple[str, list[SourceFile]]]:
    """Group the files of a folder by the first folder below it, as training data is laid out; others by their name."""
    groups: dict[str, list[SourceFile]] = {}
    for item in inputs:
        root = expand_home(item)
        is_folder = root.is_dir()
        for file in find_source_files([item], encoding):
            kind = file.full_path.name
            if is_folder:
                # Below "corpus", corpus/cn/web/a.jsonl is of the kind "cn", and
                # corpus/b.jsonl of the kind "b.jsonl".
                parts = file.full_path.relative_to(root).parts
                kind = parts[0]
            groups.setdefault(kind, []).append(file)
    yield from groups.items()


def _measure_kind(
    kind: str,
    files: Sequence[SourceFile],
    text_field: str,
    tokenizers: Sequence[Tokenizer],
) -> Measurement:
    row = Measurement(
        kind,
        texts=0,
        size=0,
        tokens=[0] * len(tokenizers),
        lossy=[0] * len(tokenizers),
    )
    unread = read_texts(files, text_field)
    while texts := list(islice(unread, BATCH)):
        row.texts += len(texts)
        row.size += sum(len(text.encode()) for text in texts)
        for number, tokenizer in enumerate(tokenizers):
            encoded = tokenizer.encode_batch(texts)
            decoded = map(tokenizer.decode, encoded)
            row.tokens[number] += sum(map(len, encoded))
            row.lossy[number] += sum(map(ne, decoded, texts))
    return row
