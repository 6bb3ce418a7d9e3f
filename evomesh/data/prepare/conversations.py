"""Tokenize conversations into token files, holding out a share of them for validation."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evomesh.data.chat import build_template
from evomesh.data.chat_message import ChatTemplate
from evomesh.data.chat_styles import ROLES
from evomesh.data.prepare.read_conversation import (
    RecordSchema,
    read_conversation,
    read_tools,
)
from evomesh.data.prepare.tokenize import (
    ProgressCallback,
    check_same_tokenizer,
    describe_sources,
    describe_tokenizer,
)
from evomesh.data.records.reader import SourceRecord, read_records
from evomesh.data.records.source_files import SourceFile, open_files
from evomesh.data.token_files.writer import BinWriter
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

Facts: TypeAlias = dict[str, Any]  # what a fingerprint records
CHUNK = 64  # conversations that a thread encodes at a time
# The names that InternEvo's alpaca_tokenizer.py writes.
SPLIT_FILES = ("train/en/dataset.bin", "valid/en/dataset.bin")


@dataclass(frozen=True)
class ChatOptions:
    """Options of tokenizing conversations; stored in the fingerprint.

    Attributes:
        schema: form of the records.
        template: a name of ``chat.STYLES``, or "tokenizer".
        roles: the roles whose messages are targets.
        max_length: longer conversations are truncated to this many tokens; the template's ending is kept.
        split_ratio: share of the conversations that is held out; 0: none, and one file is written.
        seed: seed of the train/validation split.
    """

    schema: RecordSchema
    template: str = "internlm"
    roles: tuple[str, ...] = ("assistant",)
    max_length: int = 2048
    split_ratio: float = 0.0
    seed: int = 0


@dataclass
class ChatCounts:
    """Counts of what was not written.

    Attributes:
        truncated: conversations that were truncated.
        lost_tokens: tokens that this removed.
        without_target: conversations that were left out because no target remained.
        left_out: how often the template leaves out what a message can do without, by its name.
    """

    truncated: int = 0
    lost_tokens: int = 0
    without_target: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def as_facts(self) -> Facts:
        """Return the counts as a fingerprint stores them."""
        facts = asdict(self) | {"left_out": dict(self.left_out)}
        if not self.left_out:
            del facts["left_out"]
        return facts


class EncodedConversation(NamedTuple):
    """The ids of a conversation, and the names of what its template leaves out of messages."""

    ids: list[int]
    left_out: list[str]


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
    """Tokenize conversations into ``output``: a ``.bin``, or with a split ratio a folder that gets ``SPLIT_FILES``.

    Returns:
        the fingerprint of each file by its path, and the counts.

    Raises:
        UserError: a record has another form, the tokenizer lacks the template's tokens, or there is nothing to write.
    """
    # 1. Reject bad options before the input is read.
    _check_roles(options.roles)
    template = build_template(options.template, tokenizer)
    paths = _output_paths(Path(output), options.split_ratio)

    # 2. First pass over the input: count the conversations and draw the held-out ones.
    sizes = _count_conversations(files)
    held_out = _draw_held_out(sum(sizes.values()), options)
    sources = describe_sources(files)
    input_size = sum(file.size for file in files)

    # 3. Second pass: encode every conversation and write it to its file.
    counts = ChatCounts()
    with ExitStack() as stack:
        writers = _open_writers(paths, tokenizer, append, stack)
        has_target: list[bool] = []
        num_threads = workers or os.cpu_count() or 1
        for chunk in _encode(files, template, options, num_threads):
            documents = [
                _truncate(found.ids, template.ending, options.max_length, counts)
                for found in chunk
            ]
            for found in chunk:
                counts.left_out.update(found.left_out)
            done = len(has_target)
            is_held_out = held_out[done : done + len(chunk)]
            has_target += _write(documents, is_held_out, writers, template.ending)
            done += len(chunk)
            if progress:
                bytes_read = input_size * done // len(held_out)
                tokens = sum(writer.tokens for writer in writers)
                progress(bytes_read, done, tokens)

        # 4. All files are complete: give them their names.
        counts.without_target = has_target.count(False)
        _check_files(has_target, sizes, counts, options)
        _check_sets(writers, len(held_out), counts, options)
        facts = describe_tokenizer(tokenizer) | {"options": asdict(options)}
        facts |= counts.as_facts()
        fingerprints = _commit(writers, sources, facts)
    return fingerprints, counts


def _open_writers(
    paths: Sequence[Path], tokenizer: Tokenizer, append: bool, stack: ExitStack
) -> list[BinWriter]:
    """Open the files to write, which ``stack`` closes; one that is appended to has the same tokenizer."""
    writers = []
    for path in paths:
        writer = stack.enter_context(BinWriter(path, append=append))
        check_same_tokenizer(writer, tokenizer)
        writers.append(writer)
    return writers


def _commit(
    writers: Sequence[BinWriter], sources: list[Facts], facts: Facts
) -> dict[str, Facts]:
    """Give the files their names; return the fingerprint of each by its path."""
    fingerprints = {}
    for writer in writers:
        # A file that is appended to keeps the sources of what it held before.
        earlier = writer.previous.get("sources", [])
        all_sources = earlier + sources
        all_facts = {**facts, "sources": all_sources}
        path = str(writer.path)
        fingerprints[path] = writer.commit(all_facts)
    return fingerprints


def _check_files(
    has_target: Sequence[bool],
    sizes: dict[str, int],
    counts: ChatCounts,
    options: ChatOptions,
) -> None:
    """Refuse an input file of which nothing would be left, before any output gets its name."""
    start = 0
    for name, size in sizes.items():
        end = start + size
        if size and not any(has_target[start:end]):
            raise UserError(
                f"none of the {size} conversations has a target ({counts.truncated} of all were truncated to "
                f"{options.max_length} tokens)",
                where=name,
                expected=f"messages of {', '.join(options.roles)} that are not excluded",
                fix="check --train-on, --max-length and the flags of the messages, or leave the file out",
                code="EVO-DATA-015",
            )
        start = end


def _check_sets(
    writers: Sequence[BinWriter],
    conversations: int,
    counts: ChatCounts,
    options: ChatOptions,
) -> None:
    """Refuse input that leaves one of the two sets empty."""
    if all(writer.documents for writer in writers):
        return
    raise UserError(
        f"no conversation is left for one of the two sets: {counts.without_target} of {conversations} have no "
        "target",
        where="--split-ratio",
        expected=f"messages of {', '.join(options.roles)} in both sets",
        fix="give more conversations, or draw others with --seed",
        code="EVO-DATA-015",
    )


def _check_roles(roles: Sequence[str]) -> None:
    """Refuse roles that no message can have."""
    if not roles or set(roles) - set(ROLES):
        raise UserError(
            f"no role {', '.join(roles)!r}",
            where="--train-on",
            expected=f"one or more of {', '.join(ROLES)}",
            code="EVO-CLI-002",
        )


def _output_paths(output: Path, split_ratio: float) -> list[Path]:
    """Return the files to write: the training file, then with a split ratio the held-out one."""
    if not split_ratio:
        return [output]
    if output.suffix == ".bin":
        raise UserError(
            f"{output} is one file, but --split-ratio writes two",
            where="output",
            expected=f"a folder, in which {' and '.join(SPLIT_FILES)} are written",
            code="EVO-CLI-006",
        )
    return [output / name for name in SPLIT_FILES]


def _read_all(files: list[SourceFile]) -> Iterator[SourceRecord]:
    for file, stream, _ in open_files(files):
        yield from read_records(stream, file)


def _count_conversations(files: list[SourceFile]) -> dict[str, int]:
    """Return the number of conversations of each file, in the order in which they are read."""
    sizes: Counter[str] = Counter()
    for file, stream, _ in open_files(files):
        records = read_records(stream, file)
        count = sum(1 for _ in records)
        name = str(file.path)
        sizes[name] += count
    if not sizes.total():
        first = files[0]
        where = str(first.path)
        raise UserError(
            "the input contains no conversation", where=where, code="EVO-DATA-007"
        )
    return sizes


def _draw_held_out(total: int, options: ChatOptions) -> NDArray[np.bool_]:
    """Return whether each conversation is held out; drawn without replacement, so that the share is exact."""
    count = int(total * options.split_ratio)
    if options.split_ratio and not 0 < count < total:
        raise UserError(
            f"a ratio of {options.split_ratio} leaves one of the two sets empty ({total} conversations)",
            where="--split-ratio",
            expected="a ratio that puts at least one conversation in each set",
            code="EVO-DATA-015",
        )
    rng = np.random.RandomState(options.seed)
    chosen = rng.choice(total, count, replace=False)
    held_out = np.zeros(total, np.bool_)
    held_out[chosen] = True
    return held_out


def _encode(
    files: list[SourceFile], template: ChatTemplate, options: ChatOptions, workers: int
) -> Iterator[list[EncodedConversation]]:
    """Yield conversations, in order and in chunks.

    Threads encode them: the tokenizer libraries release the interpreter lock.
    """

    def encode(chunk: Sequence[SourceRecord]) -> list[EncodedConversation]:
        encoded = []
        for record in chunk:
            messages = read_conversation(record, options.schema, options.roles)
            try:
                tools = read_tools(record)
                left_out = template.left_out(messages, tools)
                ids = template.encode(messages, tools)
                encoded.append(EncodedConversation(ids, left_out))
            except UserError as error:
                raise UserError(
                    error.found,
                    where=record.where,
                    expected=error.expected,
                    fix=error.fix,
                    code=error.code,
                ) from None
        return encoded

    # A chunk for each thread, then the next ones: no more conversations are in memory
    # than are being encoded, and their order stays.
    records = _read_all(files)
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    with ThreadPoolExecutor(workers) as pool:
        while pending := list(islice(chunks, workers)):
            yield from pool.map(encode, pending)


def _truncate(
    ids: list[int], ending: list[int], max_length: int, counts: ChatCounts
) -> list[int]:
    """Shorten a conversation to ``max_length`` tokens, the ending included, and count what is lost."""
    if len(ids) <= max_length:
        return ids
    counts.truncated += 1
    counts.lost_tokens += len(ids) - max_length
    return ids[: max_length - len(ending)] + ending


def _write(
    documents: Sequence[list[int]],
    held_out: NDArray[np.bool_],
    writers: Sequence[BinWriter],
    ending: list[int],
) -> list[bool]:
    """Write each document to the training file (the first) or the held-out file; one without a target to neither.

    Returns:
        whether each document has a target.
    """
    found: list[bool] = []
    kept: list[list[list[int]]] = [[] for _ in writers]
    for document, is_held_out in zip(documents, held_out, strict=True):
        has_target = _has_target(document, ending)
        found.append(has_target)
        if has_target:
            set_number = int(is_held_out)
            chosen = kept[set_number]
            chosen.append(document)
    for writer, chosen in zip(writers, kept, strict=True):
        writer.write(chosen, masked=True)
    return found


def _has_target(document: Sequence[int], ending: Sequence[int]) -> bool:
    """Return whether there is anything to learn: the first token has no predecessor, the ending alone is nothing."""
    stop = len(document) - len(ending)
    return any(token > 0 for token in document[1:stop])
