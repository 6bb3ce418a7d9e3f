"""``evomesh tokenizer``: train a tokenizer, and measure tokenizers on texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.command_names import CommandGroup
from evomesh.cli.options import EncodingOption, WholeFilesOption
from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.data.prepare.measure_tokenizer import Measurement
    from evomesh.data.tokenizer import Tokenizer

KINDS = ("bpe", "sentencepiece")
CHATS = ("", "internlm", "chatml", "llama3")

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False)

InputsArgument = Annotated[
    list[str], typer.Argument(metavar="IN...", help="Files, folders or globs of text.")
]
TokenizerArgument = Annotated[
    str,
    typer.Argument(
        help="A tokenizer.json, a sentencepiece .model, or a folder with one."
    ),
]
TextFieldOption = Annotated[str, typer.Option(help="Key of the text in each record.")]


@app.command()
def train(
    inputs: InputsArgument,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write."),
    ],
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Number of ids, special tokens included.")
    ],
    kind: Annotated[
        str, typer.Option(help="bpe (byte-level, tokenizer.json) or sentencepiece.")
    ] = "bpe",
    special: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN", help="A token that text never splits; repeatable."
        ),
    ] = None,
    chat: Annotated[
        str,
        typer.Option(
            help="Add the role marks of a chat template: internlm, chatml or llama3."
        ),
    ] = "",
    text_field: TextFieldOption = "text",
    encoding: EncodingOption = "utf-8",
    whole_files: WholeFilesOption = False,
) -> None:
    """Train a tokenizer on text: txt, json, jsonl, csv, parquet and arrow, as `evomesh tokenize` reads them."""
    if kind not in KINDS:
        raise UserError(
            f"no kind {kind!r}",
            where="--kind",
            expected=" or ".join(KINDS),
            code="EVO-CLI-002",
        )
    if chat not in CHATS:
        raise UserError(
            f"no chat template {chat!r}",
            where="--chat",
            expected=", ".join(CHATS[1:]),
            code="EVO-CLI-002",
        )

    from evomesh.data.prepare.train_tokenizer import TokenizerRecipe, train_tokenizer
    from evomesh.data.records.source_files import find_source_files
    from evomesh.data.tokenizer import load_tokenizer

    recipe = TokenizerRecipe(vocab_size, kind, tuple(special or ()), chat)  # type: ignore[arg-type]
    files = find_source_files(inputs, encoding, whole=whole_files)
    path = train_tokenizer(files, Path(output), recipe, text_field)
    for line in _describe(load_tokenizer(path)):
        typer.echo(line)


@app.command()
def inspect(
    tokenizer: TokenizerArgument,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IN...]", help="Texts to measure it on."),
    ] = None,
    text_field: TextFieldOption = "text",
    encoding: EncodingOption = "utf-8",
) -> None:
    """Show a tokenizer's sizes and special ids, and its bytes per token on texts, by kind."""
    from evomesh.data.prepare.measure_tokenizer import measure
    from evomesh.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    for line in _describe(loaded):
        typer.echo(line)
    if inputs:
        rows = measure(inputs, text_field, [loaded], encoding)
        _print_table(rows, [tokenizer])


@app.command()
def compare(
    first: TokenizerArgument,
    second: TokenizerArgument,
    inputs: InputsArgument,
    text_field: TextFieldOption = "text",
    encoding: EncodingOption = "utf-8",
) -> None:
    """Compare the bytes per token of two tokenizers on the same texts, by kind."""
    from evomesh.data.prepare.measure_tokenizer import measure
    from evomesh.data.tokenizer import load_tokenizer

    tokenizers = [load_tokenizer(first), load_tokenizer(second)]
    rows = measure(inputs, text_field, tokenizers, encoding)
    _print_table(rows, [first, second])
    counts_by_tokenizer = zip(*(row.tokens for row in rows), strict=True)
    tokens = [sum(counts) for counts in counts_by_tokenizer]
    if all(tokens):
        more = tokens[1] / tokens[0] - 1
        typer.echo(f"{second} needs {more:+.1%} tokens compared with {first}")


def _describe(tokenizer: Tokenizer) -> list[str]:
    template = "with" if tokenizer.chat_template else "without"
    return [
        f"{tokenizer.path}: {tokenizer.vocab_size:,} ids, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, "
        f"{template} a chat template"
    ]


def _print_table(rows: Sequence[Measurement], names: Sequence[str]) -> None:
    kind_width = len("kind")
    for row in rows:
        kind_width = max(kind_width, len(row.kind))

    heads = []
    for name in names:
        # Of a long path the end is what tells tokenizers apart.
        shown = name if len(name) <= 24 else "..." + name[-21:]
        heads.append(f" {shown:>24}")
    columns = "".join(heads)
    typer.echo(
        f"{'kind':<{kind_width}} {'texts':>10} {'bytes':>14}{columns}   (bytes per token)"
    )

    for row in rows:
        figures = "".join(f" {figure:>24.3f}" for figure in row.bytes_per_token)
        typer.echo(
            f"{row.kind:<{kind_width}} {row.texts:>10,} {row.size:>14,}{figures}"
        )

    texts = sum(row.texts for row in rows)
    for number, name in enumerate(names):
        lossy = sum(row.lossy[number] for row in rows)
        if lossy:
            typer.echo(
                f"warning: {name}: decoding does not restore {lossy:,} of {texts:,} texts"
            )
