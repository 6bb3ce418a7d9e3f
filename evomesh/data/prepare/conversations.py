"""Conversations to token files, with a share held out for validation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evomesh.data.chat import ROLES, ChatTemplate, RecordSchema, build_template, read_conversation
from evomesh.data.prepare.tokenize import ProgressCallback, check_appended, source_facts, tokenizer_facts
from evomesh.data.records.reader import SourceFile, SourceRecord, open_files, read_records
from evomesh.data.token_files.writer import BinWriter
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

CHUNK = 64  # conversations a thread encodes at a time
SPLIT_FILES = ("train/en/dataset.bin", "valid/en/dataset.bin")  # the tree of the documents' tool


@dataclass(frozen=True)
class ChatOptions:
    """What becomes of a conversation.

    Attributes:
        schema: form of the records.
        template: a name of ``chat.STYLES``, or "tokenizer".
        roles: whose turns are targets.
        max_length: longer conversations lose their tail; an ending the template always has is kept.
        split_ratio: share of the conversations that is held out; 0: none, and one file is written.
        seed: of the choice of these.
    """

    schema: RecordSchema
    template: str = "internlm"
    roles: tuple[str, ...] = ("assistant",)
    max_length: int = 2048
    split_ratio: float = 0.0
    seed: int = 0


@dataclass
class ChatCounts:
    """What was cut: conversations and tokens, and conversations that were left out for having no target."""

    truncated: int = 0
    lost_tokens: int = 0
    without_target: int = 0


def tokenize_chats(
    files: list[SourceFile],
    output: str | Path,
    tokenizer: Tokenizer,
    options: ChatOptions,
    *,
    workers: int | None = None,
    append: bool = False,
    progress: ProgressCallback | None = None,
) -> tuple[dict[str, dict[str, Any]], ChatCounts]:
    """Tokenise conversations into ``output``: a ``.bin``, or with a split ratio a folder that gets ``SPLIT_FILES``.

    Returns:
        the fingerprint of each file by its path, and the counts.

    Raises:
        UserError: a record of another form, a tokenizer without the template's tokens, or nothing to write.
    """
    if not options.roles or set(options.roles) - set(ROLES):
        raise UserError(
            f"no role {', '.join(options.roles)!r}",
            where="--train-on",
            expected=f"some of {', '.join(ROLES)}",
        )
    template = build_template(options.template, tokenizer)
    if options.split_ratio and Path(output).suffix == ".bin":
        raise UserError(
            f"{output} is one file, --split-ratio makes two",
            where="output",
            expected=f"a folder, which gets {' and '.join(SPLIT_FILES)}",
        )
    paths = [Path(output) / name for name in SPLIT_FILES] if options.split_ratio else [Path(output)]
    held_out = _held_out(files, options)
    sources, size = source_facts(files), sum(file.size for file in files)
    facts = tokenizer_facts(tokenizer) | {"options": asdict(options)}
    counts = ChatCounts()
    with ExitStack() as stack:
        writers = [stack.enter_context(BinWriter(path, append=append)) for path in paths]
        for writer in writers:
            check_appended(writer, tokenizer)
        start = 0
        for encoded in _encode(files, template, options, workers or os.cpu_count() or 1):
            kept: list[list[list[int]]] = [[] for _ in writers]
            for number, ids in enumerate(encoded, start):
                document = _cut(ids, template.ending, options.max_length, counts)
                if any(token > 0 for token in document[1 : len(document) - len(template.ending)]):
                    kept[int(held_out[number])].append(document)
                else:
                    counts.without_target += 1
            for writer, documents in zip(writers, kept, strict=True):
                if documents:
                    writer.write(documents, masked=True)
            start += len(encoded)
            if progress:
                progress(size * start // len(held_out), start, sum(writer.tokens for writer in writers))
        facts |= asdict(counts)
        return {
            str(writer.path): writer.commit(
                facts | {"sources": [*writer.previous.get("sources", []), *sources]}
            )
            for writer in writers
        }, counts


def _records(files: list[SourceFile]) -> Iterator[SourceRecord]:
    for file, stream, _ in open_files(files):
        yield from read_records(stream, file)


def _held_out(files: list[SourceFile], options: ChatOptions) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each conversation belongs to validation; drawn without replacement, so that the share is exact."""
    total = sum(1 for _ in _records(files))
    if not total:
        raise UserError("the input holds no conversation", where=str(files[0].path))
    chosen = np.zeros(total, np.bool_)
    count = int(total * options.split_ratio)
    if options.split_ratio and not 0 < count < total:
        raise UserError(
            f"a ratio of {options.split_ratio} of {total} conversations leaves one part empty",
            where="--split-ratio",
            expected="a ratio that gives each part at least one conversation",
        )
    chosen[np.random.RandomState(options.seed).choice(total, count, replace=False)] = True
    return chosen


def _encode(
    files: list[SourceFile], template: ChatTemplate, options: ChatOptions, workers: int
) -> Iterator[list[list[int]]]:
    """Conversations in order, encoded by threads (the tokenizer libraries release the interpreter lock)."""

    def encode(records: Sequence[SourceRecord]) -> list[list[int]]:
        return [
            template.encode(read_conversation(record, options.schema, options.roles)) for record in records
        ]

    records = _records(files)
    with ThreadPoolExecutor(workers) as pool:
        while chunks := [chunk for _ in range(workers) if (chunk := list(islice(records, CHUNK)))]:
            yield from pool.map(encode, chunks)


def _cut(ids: list[int], ending: list[int], limit: int, counts: ChatCounts) -> list[int]:
    if len(ids) <= limit:
        return ids
    counts.truncated += 1
    counts.lost_tokens += len(ids) - limit
    return ids[: limit - len(ending)] + ending
