"""``evomesh tokenize``; ``tools/alpaca_tokenizer.py`` calls it too."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, cast

import typer

from evomesh.cli.options import EncodingOption, WholeFilesOption
from evomesh.errors import UserError
from evomesh.quantities import counted

if TYPE_CHECKING:
    from evomesh.data.prepare.conversations import ChatOptions
    from evomesh.data.prepare.read_conversation import RecordSchema
    from evomesh.data.prepare.tokenize import ProgressCallback, TextOptions
    from evomesh.data.records.source_files import SourceFile

PRINT_SECONDS = 10.0
# What other programs call the formats.
SIMILAR_FORMATS = {
    "openai": "messages",
    "chat": "messages",
    "txt": "text",
    "jsonl": "text",
    "json": "text",
}
CHAT_FORMATS = ("alpaca", "messages", "sharegpt", "xtuner")

InputsArgument = Annotated[
    list[str], typer.Argument(metavar="IN...", help="Files, folders or globs.")
]
OutputOption = Annotated[
    str,
    typer.Option(
        "--output", "-o", help="The .bin to write, or a folder with --split-ratio."
    ),
]
TokenizerOption = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        "-t",
        help="A tokenizer.json, a sentencepiece .model, or a folder with one.",
    ),
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        help="text; or conversations: alpaca (instruction, input, output), messages (role, content), "
        "sharegpt (from, value), xtuner (input, output).",
    ),
]
TextFieldOption = Annotated[str, typer.Option(help="Key of the text in each record.")]
RawLinesOption = Annotated[
    bool,
    typer.Option(
        "--raw-lines", help="Encode each line verbatim, like InternEvo's tokenizer.py."
    ),
]
BosOption = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Prepend bos to every document [default: as the tokenizer's config says].",
    ),
]
EosOption = Annotated[
    bool, typer.Option("--eos/--no-eos", help="Append eos to every document.")
]
AppendOption = Annotated[
    bool,
    typer.Option(
        "--append", help="Append to an existing file instead of replacing it."
    ),
]
ChatTemplateOption = Annotated[
    str,
    typer.Option(
        help="internlm, chatml, llama3, one of XTuner's, such as xtuner_mistral, or tokenizer (the template in the "
        "tokenizer's folder)."
    ),
]
TrainOnOption = Annotated[
    str, typer.Option(help="Roles whose messages are targets, comma-separated.")
]
MaxLengthOption = Annotated[
    int, typer.Option(min=2, help="Truncate conversations to this many tokens.")
]
SplitRatioOption = Annotated[
    float,
    typer.Option(min=0, max=1, help="Share of conversations held out for validation."),
]
SplitSeedOption = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Seed of the train/validation split.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Number of threads [default: all cores].")
]


def tokenize(
    inputs: InputsArgument,
    output: OutputOption,
    tokenizer: TokenizerOption,
    format: FormatOption = "text",
    text_field: TextFieldOption = "text",
    encoding: EncodingOption = "utf-8",
    raw_lines: RawLinesOption = False,
    whole_files: WholeFilesOption = False,
    bos: BosOption = None,
    eos: EosOption = True,
    append: AppendOption = False,
    chat_template: ChatTemplateOption = "internlm",
    train_on: TrainOnOption = "assistant",
    max_length: MaxLengthOption = 2048,
    split_ratio: SplitRatioOption = 0.0,
    seed: SplitSeedOption = 0,
    workers: WorkersOption = None,
) -> None:
    """Tokenize text or conversations into a .bin with its .meta.

    Inputs are txt (one document per line), json (a list), jsonl and csv, each also as
    .gz or .zst; parquet and arrow; and .tar, .tar.gz and .zip archives of them. With
    --whole-files each file is a document: .py, .md, .rst, .html ...
    """
    from evomesh.data.prepare.tokenize import TextOptions, set_encoder_threads

    _check_options(format, split_ratio, raw_lines, whole_files)
    set_encoder_threads(workers)
    if format == "text":
        text_options = TextOptions(text_field, raw_lines, bos, eos)
        tokenize_text(
            inputs, output, tokenizer, text_options, append, encoding, whole_files
        )
        return

    from evomesh.data.prepare.conversations import ChatOptions

    roles = tuple(role.strip() for role in train_on.split(","))
    options = ChatOptions(
        cast("RecordSchema", format),
        chat_template,
        roles,
        max_length,
        split_ratio,
        seed,
    )
    tokenize_conversations(
        inputs, output, tokenizer, options, workers, append, encoding
    )


def _check_options(
    format_name: str, split_ratio: float, raw_lines: bool, whole_files: bool
) -> None:
    """Check that the format exists, and the options that others exclude.

    Raises:
        UserError: names the first that is wrong.
    """
    if format_name not in ("text", *CHAT_FORMATS):
        raise _no_format(format_name)
    if format_name != "text" and whole_files:
        raise UserError(
            "--whole-files only applies to text", fix="leave it out", code="EVO-CLI-004"
        )
    if format_name == "text" and split_ratio:
        raise UserError(
            "--split-ratio only applies to conversations",
            fix="tokenize training and validation text separately",
            code="EVO-CLI-004",
        )
    if whole_files and raw_lines:
        raise UserError(
            "--raw-lines and --whole-files exclude each other",
            fix="leave out one of them",
            code="EVO-CLI-004",
        )


def _no_format(name: str) -> UserError:
    """Return the error for a format that does not exist, with what it may mean."""
    known = ("text", *CHAT_FORMATS)
    meant = SIMILAR_FORMATS.get(name) or next(iter(get_close_matches(name, known)), "")
    return UserError(
        f"no format {name!r}",
        where="--format",
        expected=" or ".join([", ".join(known[:-1]), known[-1]]),
        fix=f"did you mean {meant}?" if meant else "",
        code="EVO-CLI-002",
    )


def tokenize_text(
    inputs: list[str],
    output: str,
    tokenizer: str,
    options: TextOptions,
    append: bool = False,
    encoding: str = "utf-8",
    whole_files: bool = False,
) -> None:
    """Run ``evomesh tokenize --format text``; with ``whole_files`` each file is a document."""
    from evomesh.data.prepare.tokenize import tokenize_files
    from evomesh.data.records.source_files import find_source_files
    from evomesh.data.tokenizer import load_tokenizer

    files = find_source_files(inputs, encoding, whole=whole_files)
    with progress_bar(sum(file.size for file in files)) as progress:
        fingerprint = tokenize_files(
            files,
            output,
            load_tokenizer(tokenizer),
            options,
            append=append,
            progress=progress,
        )
    print(
        f"{output}: {counted(fingerprint['documents'], 'document')}, {counted(fingerprint['tokens'], 'token')}, "
        f"largest id {fingerprint['max_id']}; {_origin(files)}"
    )
    empty = fingerprint.get("empty_texts", 0)
    if empty:
        print(
            f"warning: empty texts: {empty:,} of {fingerprint['documents']:,}; their documents hold no more than bos, "
            "eos and white space: remove them from the input if there should be none"
        )


def _origin(files: Sequence[SourceFile]) -> str:
    """Say how many files were read, and what a document of a text file is."""
    count = len(files)
    has_lines = any(file.format == "txt" for file in files)
    note = ", each line of a .txt being a document" if has_lines else ""
    return f"from {counted(count, 'file')}{note}"


def tokenize_conversations(
    inputs: list[str],
    output: str,
    tokenizer: str,
    options: ChatOptions,
    workers: int | None = None,
    append: bool = False,
    encoding: str = "utf-8",
) -> None:
    """Run ``evomesh tokenize --format alpaca|messages|sharegpt|xtuner``."""
    from evomesh.data.prepare.conversations import tokenize_chats
    from evomesh.data.records.source_files import find_source_files
    from evomesh.data.tokenizer import load_tokenizer

    files = find_source_files(inputs, encoding)
    loaded = load_tokenizer(tokenizer)
    with progress_bar(sum(file.size for file in files)) as progress:
        fingerprints, counts = tokenize_chats(
            files,
            output,
            loaded,
            options,
            workers=workers,
            append=append,
            progress=progress,
        )
    for path, fingerprint in fingerprints.items():
        print(
            f"{path}: {counted(fingerprint['documents'], 'conversation')}, {counted(fingerprint['tokens'], 'token')}, "
            f"largest id {fingerprint['max_id']}"
        )
    print(
        f"truncated to {options.max_length} tokens: {counted(counts.truncated, 'conversation')} "
        f"({counted(counts.lost_tokens, 'token')} lost); left out because no target remained: {counts.without_target:,}"
    )
    if counts.left_out:
        parts = [
            f"{name} {number:,} times"
            for name, number in sorted(counts.left_out.items())
        ]
        left_out = ", ".join(parts)
        typer.echo(f"warning: the chat template leaves out {left_out}", err=True)


def _print_progress(total: int) -> ProgressCallback:
    """Return a callback that prints a line every ``PRINT_SECONDS``."""
    start = last = time.monotonic()

    def update(position: int, documents: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > PRINT_SECONDS and position:
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
    """Show a bar with rate and remaining time on a terminal; elsewhere print a line every ``PRINT_SECONDS``."""
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
        yield _print_progress(total)
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
            bar.update(
                task,
                completed=position,
                done=f"{documents:,} documents {tokens:,} tokens",
            )

        yield update
