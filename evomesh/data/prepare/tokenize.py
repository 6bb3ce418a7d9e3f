"""Text files to a token file."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from evomesh.data.records.reader import (
    SourceFile,
    SourceRecord,
    field_text,
    open_files,
    read_lines,
    read_records,
)
from evomesh.data.token_files.writer import BinWriter
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

BATCH_CHARS = (
    1 << 20
)  # text encoded in one call: enough to keep all cores busy, little enough to keep memory flat
BATCH_DOCUMENTS = 4096
AHEAD = 2  # batches in the encoder: one's ids become Python lists while the next is encoded

ProgressCallback = Callable[[int, int, int], None]  # bytes read, documents, tokens


@dataclass(frozen=True)
class TextOptions:
    """What becomes of a record's text.

    Attributes:
        text_field: key of the text in a JSON record.
        raw_lines: encode whole lines as they stand (the documents' tool).
        bos: put the tokenizer's bos in front; None: as the tokenizer says.
        eos: put its eos behind.
    """

    text_field: str = "text"
    raw_lines: bool = False
    bos: bool | None = None
    eos: bool = True


def tokenize_files(
    files: list[SourceFile],
    output: str | Path,
    tokenizer: Tokenizer,
    options: TextOptions,
    *,
    append: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Tokenise ``files`` into one ``.bin`` with meta and fingerprint; returns the fingerprint.

    Raises:
        UserError: a record without the field, a broken file, no document at all, a missing bos or eos.
    """
    head, tail = frame(tokenizer, options)
    with BinWriter(output, append=append) as writer, ThreadPoolExecutor(AHEAD) as encoder:
        check_appended(writer, tokenizer)
        waiting: deque[tuple[Future[list[list[int]]], int]] = deque()

        def write_oldest() -> None:
            encoded, position = waiting.popleft()
            ids = encoded.result()
            writer.write([head + document + tail for document in ids] if head or tail else ids)
            if progress:
                progress(position, writer.documents, writer.tokens)

        for texts, position in _batches(files, options):
            waiting.append((encoder.submit(tokenizer.encode_batch, texts), position))
            if len(waiting) > AHEAD:
                write_oldest()
        while waiting:
            write_oldest()
        facts = tokenizer_facts(tokenizer) | {
            "options": asdict(options),
            "sources": [*writer.previous.get("sources", []), *source_facts(files)],
        }
        return writer.commit(facts)


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer's part of a fingerprint."""
    return {
        "tokenizer": tokenizer.path.name,
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


def check_appended(writer: BinWriter, tokenizer: Tokenizer) -> None:
    """Refuse to add to a file of another tokenizer."""
    if writer.previous.get("tokenizer_hash") not in (None, tokenizer.hash):
        raise UserError(
            "the existing file was made with another tokenizer",
            where=str(writer.path),
            fix="leave out --append to replace it",
        )


def source_facts(files: list[SourceFile]) -> list[dict[str, Any]]:
    """Names, sizes and hashes of the inputs."""
    facts = []
    for path, _ in groupby(file.path for file in files):  # an archive's members follow one another
        with path.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
        facts.append({"file": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return facts


def set_workers(workers: int | None) -> None:
    """Threads that the tokenizer library uses; must be called before the first text is encoded."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)


def frame(tokenizer: Tokenizer, options: TextOptions) -> tuple[list[int], list[int]]:
    """Ids before and behind every text."""
    bos = tokenizer.add_bos if options.bos is None else options.bos
    for wanted, name, token in ((bos, "bos", tokenizer.bos_id), (options.eos, "eos", tokenizer.eos_id)):
        if wanted and token is None:
            raise UserError(
                f"the tokenizer names no {name} token",
                where=str(tokenizer.path),
                expected=f"{name}_token in the tokenizer_config.json beside it",
                fix=f"add it there, or tokenise with --no-{name}",
            )
    head = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    tail = [tokenizer.eos_id] if options.eos and tokenizer.eos_id is not None else []
    return head, tail


def _batches(files: list[SourceFile], options: TextOptions) -> Iterator[tuple[list[str], int]]:
    """Texts in batches, with the number of input bytes read so far (of packed files: packed bytes)."""
    texts: list[str] = []
    chars = done = position = 0
    for file, stream, raw in open_files(files):
        for text in _texts(stream, file, options):
            texts.append(text)
            chars += len(text)
            if chars >= BATCH_CHARS or len(texts) >= BATCH_DOCUMENTS:
                position = done + raw.tell()
                yield texts, position
                texts, chars = [], 0
        done += file.size
    if texts:
        yield texts, done


def _texts(stream: IO[bytes], file: SourceFile, options: TextOptions) -> Iterator[str]:
    records: Iterator[SourceRecord] = (
        read_lines(stream, file) if options.raw_lines else read_records(stream, file)
    )
    for record in records:
        yield record.value if options.raw_lines else field_text(record, options.text_field)
