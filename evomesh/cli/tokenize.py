"""``evomesh tokenize`` and the documents' ``tools/tokenizer.py``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from evomesh.data.prepare.tokenize import ProgressCallback

LOG_SECONDS = 10.0
CHAT = "conversations: alpaca (instruction, input, output), messages (role, content), sharegpt (from, value)"


def tokenize(
    inputs: Annotated[list[str], typer.Argument(metavar="IN...", help="Text files, folders or globs.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The .bin to write; a folder with --split-ratio.")
    ],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", "-t", help="tokenizer.json, sentencepiece .model, or folder.")
    ],
    format: Annotated[str, typer.Option("--format", help=f"text, or {CHAT}.")] = "text",
    text_field: Annotated[str, typer.Option(help="Key of the text in a record.")] = "text",
    raw_lines: Annotated[
        bool, typer.Option("--raw-lines", help="Encode whole lines, as the documents' tool.")
    ] = False,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Bos in front [as the tokenizer says].")
    ] = None,
    eos: Annotated[bool, typer.Option("--eos/--no-eos", help="Eos behind every document.")] = True,
    append: Annotated[
        bool, typer.Option("--append", help="Add to an existing file instead of replacing it.")
    ] = False,
    chat_template: Annotated[
        str, typer.Option(help="internlm, chatml, llama3, or tokenizer (its folder's own).")
    ] = ("internlm"),
    train_on: Annotated[
        str, typer.Option(help="Roles whose turns are targets, comma-separated.")
    ] = "assistant",
    max_length: Annotated[int, typer.Option(min=2, help="Conversations are cut to this many tokens.")] = 2048,
    split_ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of conversations held out.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of these.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads [all cores].")] = None,
) -> None:
    """Tokenise text (txt: a document a line; json: a list; jsonl, csv, each also .gz, .zst; parquet; arrow;
    .tar, .tar.gz, .zip of these) or conversations into a .bin with its .meta."""
    from evomesh.data.prepare.tokenize import TextOptions, set_workers, tokenize_files
    from evomesh.data.records.reader import find_texts
    from evomesh.data.tokenizer import load_tokenizer
    from evomesh.errors import UserError

    set_workers(workers)
    files = find_texts(inputs)
    if format in ("alpaca", "messages", "sharegpt"):
        from evomesh.data.prepare.conversations import ChatOptions

        roles = tuple(role.strip() for role in train_on.split(","))
        options = ChatOptions(format, chat_template, roles, max_length, split_ratio, seed)  # type: ignore[arg-type]
        tokenize_conversations(inputs, output, tokenizer, options, workers, append)
        return
    if format != "text":
        raise UserError(
            f"no format {format!r}", where="--format", expected="text, alpaca, messages or sharegpt"
        )
    if split_ratio:
        raise UserError(
            "--split-ratio is for conversations", fix="tokenise training and validation text apart"
        )
    total = sum(file.size for file in files)
    with progress_bar(total) as progress:
        facts = tokenize_files(
            files,
            output,
            load_tokenizer(tokenizer),
            TextOptions(text_field, raw_lines, bos, eos),
            append=append,
            progress=progress,
        )
    print(
        f"{output}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, largest id {facts['max_id']}"
    )


def tokenize_conversations(
    inputs: list[str],
    output: str,
    tokenizer: str,
    options: object,
    workers: int | None = None,
    append: bool = False,
) -> None:
    """``evomesh tokenize --format alpaca|messages|sharegpt``; ``options``: a ``ChatOptions``."""
    from evomesh.data.prepare.conversations import ChatOptions, tokenize_chats
    from evomesh.data.records.reader import find_texts
    from evomesh.data.tokenizer import load_tokenizer

    assert isinstance(options, ChatOptions)
    files, loaded = find_texts(inputs), load_tokenizer(tokenizer)
    with progress_bar(sum(file.size for file in files)) as progress:
        written, counts = tokenize_chats(
            files, output, loaded, options, workers=workers, append=append, progress=progress
        )
    for path, facts in written.items():
        print(
            f"{path}: {facts['documents']:,} conversations, {facts['tokens']:,} tokens, largest id {facts['max_id']}"
        )
    print(
        f"cut to {options.max_length} tokens: {counts.truncated:,} conversations, {counts.lost_tokens:,} tokens lost; "
        f"left out for having no target: {counts.without_target:,}"
    )


def _log_lines(total: int) -> ProgressCallback:
    start = last = time.monotonic()

    def update(position: int, documents: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > LOG_SECONDS and position:
            last = now
            left = (now - start) * (total - position) / position
            rate = tokens / (now - start)
            print(
                f"{position / total:.0%}, {documents:,} documents, {tokens:,} tokens, "
                f"{rate:,.0f} tokens/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return update


@contextmanager
def progress_bar(total: int) -> Iterator[ProgressCallback]:
    """A bar with rate and time left on a terminal; elsewhere a line every ``LOG_SECONDS``."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _log_lines(total)
        return
    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[done]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, done="")

        def update(position: int, documents: int, tokens: int) -> None:
            bar.update(task, completed=position, done=f"{documents:,} documents {tokens:,} tokens")

        yield update
