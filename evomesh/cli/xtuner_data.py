"""``evomesh xtuner tokenize | log-dataset | check-custom-dataset``: the data that an XTuner config names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evomesh.config.loader import LoadedConfig

ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A config file, or a name that list-cfg prints."
    ),
]


def tokenize(config: ConfigArgument) -> None:
    """Make the token files of the raw data that CONFIG names; those that exist are left alone."""
    loaded = _load(config)
    if not loaded.preparation:
        print(
            f"{config}: nothing to do, it names token files: {loaded.config.data.train_folder}"
        )
    make_token_files(loaded, is_alone=True)


def make_token_files(loaded: LoadedConfig, *, is_alone: bool = False) -> None:
    """Tokenize the raw data of a config where its token files do not exist yet.

    Args:
        is_alone: no other process does the same; None of the launcher's variables is looked at then.
    Raises:
        UserError: this is one of several processes.
    """
    from evomesh.train.launchers import detect

    for command in loaded.preparation:
        output = Path(command[command.index("--output") + 1])
        if output.exists():
            continue
        # Tokenizing is not shared out over ranks.
        if not is_alone and detect(os.environ).world_size > 1:
            raise UserError(
                f"the raw data has no token files yet: {output}",
                where=loaded.path,
                fix=f"make them once, before training: evomesh xtuner tokenize {loaded.path}",
                code="EVO-DATA-001",
            )
        run_tokenize(command)


def run_tokenize(command: Sequence[str]) -> None:
    """Run an ``evomesh tokenize`` command line, after making the folder of its output.

    Args:
        command: the arguments of ``evomesh``, "tokenize" first.
    """
    from evomesh.cli.tokenize import tokenize as command_line
    from evomesh.cli.usage import single_command

    _, *arguments = command
    position = arguments.index("--output") + 1
    output = Path(arguments[position])
    folder = output.parent
    folder.mkdir(parents=True, exist_ok=True)
    shown = " ".join(command)
    print(f"evomesh {shown}", file=sys.stderr)
    # The options are read as on the command line.
    app = single_command(command_line)
    app(arguments, standalone_mode=False)


def log_dataset(
    config: ConfigArgument,
    pack: Annotated[int, typer.Option(min=0, help="Number of the pack.")] = 0,
) -> None:
    """Show a pack of CONFIG's data as training sees it: text (dim: no targets), or ids without a tokenizer."""
    from evomesh.data.inspect import open_packs, pack_text
    from evomesh.data.tokenizer import load_tokenizer

    loaded = _load(config)
    make_token_files(loaded, is_alone=True)
    data = loaded.config.data
    packs = open_packs(_folder(loaded), data)
    if pack >= len(packs):
        raise UserError(
            f"there is no pack {pack}: the data has {len(packs)} of {data.packed_length:,} tokens",
            where=_folder(loaded),
            fix="take a smaller --pack, or a smaller max_length in the config",
            code="EVO-CLI-003",
        )
    tokenizer = load_tokenizer(data.tokenizer_path) if data.tokenizer_path else None
    print(f"pack {pack} of {len(packs)}, {data.packed_length:,} tokens")
    typer.echo(pack_text(packs.read(pack), tokenizer))


def check_custom_dataset(config: ConfigArgument) -> None:
    """Check every line of CONFIG's data: ids, offsets and counts. Exit code 1 on problems."""
    from evomesh.cli.data import verify

    loaded = _load(config)
    make_token_files(loaded, is_alone=True)
    verify(
        _folder(loaded),
        loaded.config.data.tokenizer_path,
        loaded.config.model.vocab_size,
        None,
    )


def _load(config: str) -> LoadedConfig:
    from evomesh.cli.config import find_named_config
    from evomesh.config.loader import load_config

    return load_config(find_named_config(config))


def _folder(loaded: LoadedConfig) -> str:
    folder = loaded.config.data.train_folder
    if folder is None:
        raise UserError(
            "the config names no data",
            where=loaded.path,
            fix="set dataset_folder",
            code="EVO-CLI-009",
        )
    return folder
