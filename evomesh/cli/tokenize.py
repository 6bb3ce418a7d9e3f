"""``evomesh tokenize`` and the documents' ``tools/tokenizer.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from evomesh.data.tokenize import Progress


def tokenize(
    inputs: Annotated[list[str], typer.Argument(metavar="IN...", help="Text files, folders or globs.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The .bin to write, such as data/en/x.bin.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", "-t", help="tokenizer.json, sentencepiece .model, or folder.")
    ],
    text_field: Annotated[str, typer.Option(help="Key of the text in json and jsonl records.")] = "text",
    raw_lines: Annotated[bool, typer.Option("--raw-lines", help="Encode whole lines, as the documents' tool.")] = False,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help="Bos in front [as the tokenizer says].")] = None,
    eos: Annotated[bool, typer.Option("--eos/--no-eos", help="Eos behind every document.")] = True,
    append: Annotated[bool, typer.Option("--append", help="Add to an existing file instead of replacing it.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads [all cores].")] = None,
) -> None:
    """Tokenise text (txt: a document a line; json: a list; jsonl; each also .gz, .zst) into a .bin with its .meta."""
    from evomesh.data.sources import find_texts
    from evomesh.data.tokenize import TextOptions, set_workers, tokenize_files
    from evomesh.data.tokenizer import load_tokenizer

    set_workers(workers)
    files = find_texts(inputs)
    total = sum(file.path.stat().st_size for file in files)
    with progress_bar(total) as progress:
        facts = tokenize_files(
            files,
            output,
            load_tokenizer(tokenizer),
            TextOptions(text_field, raw_lines, bos, eos),
            append=append,
            progress=progress,
        )
    print(f"{output}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, largest id {facts['max_id']}")


@contextmanager
def progress_bar(total: int) -> Iterator[Progress | None]:
    """A bar with rate and time left on a terminal; silent elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
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
