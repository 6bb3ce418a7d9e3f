"""Tokenize text files into a token file."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

from evomesh.data.records.chat_form import chat_format
from evomesh.data.records.encodings import UTF8
from evomesh.data.records.reader import (
    SourceRecord,
    read_raw_lines,
    read_records,
    record_text,
)
from evomesh.data.records.source_files import SourceFile, open_files
from evomesh.data.token_files.writer import BinWriter
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

# Encoded in one call: enough to keep all cores busy, while memory stays constant.
BATCH_CHARS = 1 << 20
BATCH_DOCUMENTS = 4096
# In the encoder: while one is encoded, the ids of the other become Python lists.
BATCHES_PENDING = 2

ProgressCallback = Callable[[int, int, int], None]  # bytes read, documents, tokens


@dataclass(frozen=True)
class TextOptions:
    """Options of tokenizing text records; stored in the fingerprint.

    Attributes:
        text_field: key of the text in a JSON record.
        raw_lines: encode lines verbatim, as InternEvo's tokenizer.py does.
        bos: prepend the tokenizer's bos; None: as the tokenizer's config specifies.
        eos: append the tokenizer's eos.
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
    """Tokenize ``files`` into one ``.bin`` with its meta and fingerprint, and return the fingerprint.

    Raises:
        UserError: a record lacks the field, a file is damaged, there is no document, or bos or eos is missing.
    """
    prefix, suffix = boundary_ids(tokenizer, options)
    with (
        BinWriter(output, append=append) as writer,
        ThreadPoolExecutor(BATCHES_PENDING) as encoder,
    ):
        check_same_tokenizer(writer, tokenizer)
        empty_texts = writer.previous.get("empty_texts", 0)
        # Batches being encoded, oldest first, each with the input bytes read when it
        # was complete.
        pending: deque[tuple[Future[EncodedTexts], int]] = deque()

        def write_oldest() -> None:
            nonlocal empty_texts
            encoding, position = pending.popleft()
            encoded = encoding.result()
            documents = encoded.documents
            if prefix or suffix:
                documents = [prefix + ids + suffix for ids in documents]
            writer.write(documents, text_bytes=encoded.text_bytes)
            empty_texts += encoded.empty
            if progress:
                progress(position, writer.documents, writer.tokens)

        for texts, position in _batches(files, options):
            pending.append((encoder.submit(_encode, tokenizer, texts), position))
            if len(pending) > BATCHES_PENDING:
                write_oldest()
        while pending:
            write_oldest()
        facts = describe_tokenizer(tokenizer) | {
            "options": asdict(options),
            "sources": [*writer.previous.get("sources", []), *describe_sources(files)],
        }
        if empty_texts:
            facts["empty_texts"] = empty_texts
        return writer.commit(facts)


class EncodedTexts(NamedTuple):
    """The ids of texts, the bytes of these texts in UTF-8, and how many hold nothing but white space."""

    documents: list[list[int]]
    text_bytes: int
    empty: int


def _encode(tokenizer: Tokenizer, texts: list[str]) -> EncodedTexts:
    text_bytes = sum(map(utf8_length, texts))
    empty = sum(not text or text.isspace() for text in texts)
    return EncodedTexts(tokenizer.encode_batch(texts), text_bytes, empty)


def utf8_length(text: str) -> int:
    """Return the bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the fields of a fingerprint that identify the tokenizer."""
    return {
        "tokenizer": tokenizer.path.name,
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


def describe_sources(files: list[SourceFile]) -> list[dict[str, Any]]:
    """Return the names, sizes and hashes of the inputs, as a fingerprint stores them."""
    sources = []
    # The members of an archive are consecutive.
    for (path, encoding), _ in groupby((file.path, file.encoding) for file in files):
        with path.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
        source: dict[str, Any] = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": digest,
        }
        if encoding != UTF8:
            source["encoding"] = encoding
        sources.append(source)
    return sources


def check_same_tokenizer(writer: BinWriter, tokenizer: Tokenizer) -> None:
    """Refuse to append to a file that another tokenizer made."""
    if writer.previous.get("tokenizer_hash") not in (None, tokenizer.hash):
        raise UserError(
            "the existing file was made with another tokenizer",
            where=str(writer.path),
            fix="omit --append to replace it",
            code="EVO-DATA-019",
        )


def set_encoder_threads(workers: int | None) -> None:
    """Set how many threads the tokenizer library uses; must be called before the first text is encoded."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)


def boundary_ids(
    tokenizer: Tokenizer, options: TextOptions
) -> tuple[list[int], list[int]]:
    """Return the ids before and after every text.

    Raises:
        UserError: bos or eos is requested, and the tokenizer has none.
    """
    prefix = list(tokenizer.leading)
    if options.bos is not None:
        prefix = []
    if options.bos:
        prefix.append(_require_token(tokenizer, "bos", tokenizer.bos_id))
    suffix = [_require_token(tokenizer, "eos", tokenizer.eos_id)] if options.eos else []
    return prefix, suffix


def _require_token(tokenizer: Tokenizer, name: str, token_id: int | None) -> int:
    if token_id is None:
        raise UserError(
            f"the tokenizer defines no {name} token",
            where=str(tokenizer.path),
            expected=f"{name}_token in the tokenizer_config.json beside it",
            fix=f"add it there, or tokenize with --no-{name}",
            code="EVO-TOKEN-005",
        )
    return token_id


def _batches(
    files: list[SourceFile], options: TextOptions
) -> Iterator[tuple[list[str], int]]:
    """Yield batches of texts, with the number of input bytes read so far (compressed bytes of compressed files)."""
    texts: list[str] = []
    chars = 0
    finished_bytes = 0
    for file, stream, raw in open_files(files):
        for text in _texts(stream, file, options):
            texts.append(text)
            chars += len(text)
            if chars >= BATCH_CHARS or len(texts) >= BATCH_DOCUMENTS:
                yield texts, finished_bytes + raw.tell()
                texts = []
                chars = 0
        finished_bytes += file.size
    if texts:
        yield texts, finished_bytes


def _texts(stream: IO[bytes], file: SourceFile, options: TextOptions) -> Iterator[str]:
    """Yield the texts of one file."""
    if options.raw_lines:
        for line in read_raw_lines(stream, file):
            yield line.value
    else:
        for record in read_records(stream, file):
            yield _text_of_record(record, options.text_field)


def _text_of_record(record: SourceRecord, field: str) -> str:
    try:
        return record_text(record, field)
    except UserError as error:
        if not isinstance(record.value, dict) or field in record.value:
            raise
        name = chat_format(record.value)
        other = "encode whole lines with --raw-lines"
        if name:
            other = f"tokenize conversations with --format {name}"
        raise UserError(
            error.found,
            where=error.where,
            expected=error.expected,
            fix=f"name the field with --text-field NAME, or {other}",
            code=error.code,
        ) from None
