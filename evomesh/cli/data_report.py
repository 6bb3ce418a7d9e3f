"""``evomesh data report``: one page of a data folder."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.quantities import counted

if TYPE_CHECKING:
    from evomesh.config.data import DataConfig
    from evomesh.data.tokenizer import Tokenizer

READ_TOKENS = 20_000_000


FolderArgument = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER",
        help="Folder of token files, or of jsonl, json, csv, txt, parquet or arrow files; or one of these.",
    ),
]
OutArgument = Annotated[
    str, typer.Argument(metavar="OUT.html", help="The file to write.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", help="Show the packing loss, and use the tokenizer, of this."
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", "-t", help="Tokenizer of the data."),
]
SeqLenOption = Annotated[
    int, typer.Option(min=1, help="Maximum attention segment, without --config.")
]
MicroBszOption = Annotated[
    int, typer.Option(min=1, help="Pack length in multiples of seq-len.")
]
TextFieldOption = Annotated[
    str, typer.Option(help="Field of a raw record that holds its text.")
]
TokensOption = Annotated[
    int,
    typer.Option(
        min=0, help="Read about so many tokens, evenly spaced; 0: everything."
    ),
]


def report(
    folder: FolderArgument,
    out: OutArgument,
    config: ConfigOption = None,
    tokenizer: TokenizerOption = None,
    seq_len: SeqLenOption = 2048,
    micro_bsz: MicroBszOption = 1,
    text_field: TextFieldOption = "text",
    tokens: TokensOption = READ_TOKENS,
) -> None:
    """Write one HTML page of a data folder.

    Lengths, types, duplicates, scripts and languages, token frequencies, samples and
    packing loss. The page is a single file without anything from elsewhere.
    """
    from evomesh.config.user import expand_home
    from evomesh.data.survey.documents import TokenFolder, open_folder
    from evomesh.data.survey.survey import survey_of
    from evomesh.errors import UserError
    from evomesh.runs.page import refuse_folder, render_data_page, write_page

    if not out.endswith((".html", ".htm")):
        raise UserError(
            f"the last argument is {out!r}",
            expected="a file whose name ends with .html",
            fix="evomesh data report FOLDER data.html",
            code="EVO-CLI-006",
        )
    target = expand_home(out)
    refuse_folder(target)  # before minutes of reading
    section = _section(folder, config, seq_len, micro_bsz)
    loaded = _tokenizer(tokenizer, section)
    opened = open_folder(folder, text_field, loaded, tokens)
    survey = survey_of(opened, loaded, section)
    page = render_data_page(
        {
            "written": time.time(),
            "folder": str(expand_home(folder).resolve()),
            "tokenizer": None if loaded is None else str(loaded.path),
            **survey,
        }
    )
    write_page(target, page)
    read = survey["read"]
    what = "token file" if isinstance(opened, TokenFolder) else "text file"
    typer.echo(
        f"{folder}: {counted(len(opened.files), what)}, {counted(read['of_documents'], 'document')}"
    )
    if not read["is_complete"]:
        typer.echo(
            f"read {counted(read['documents'], 'document')}, {read['units']:,} tokens or words; everything: --tokens 0"
        )
    typer.echo(f"wrote {target} ({len(page) / 1e6:.1f} MB)")


def _section(
    folder: str, config: str | None, seq_len: int, micro_bsz: int
) -> DataConfig:
    """Return the data section of a config, or of the options, for the folder."""
    from evomesh.config.data import DataConfig

    if config is None:
        return DataConfig(seq_len=seq_len, micro_bsz=micro_bsz, train_folder=folder)
    from evomesh.config.loader import load_config

    loaded = load_config(config)
    options = {
        "train_folder": folder,
        "type": "tokenized",
    }
    return loaded.config.data.model_copy(update=options)


def _tokenizer(path: str | None, section: DataConfig) -> Tokenizer | None:
    """Return the tokenizer of the option, else that of the config if it is there."""
    from evomesh.config.user import expand_home
    from evomesh.data.tokenizer import load_tokenizer

    if path is not None:
        return load_tokenizer(path)
    named = section.tokenizer_path
    if named is not None and expand_home(named).exists():
        return load_tokenizer(named, "data.tokenizer_path")
    return None
