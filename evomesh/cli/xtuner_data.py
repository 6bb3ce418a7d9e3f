"""``evomesh xtuner tokenize | log-dataset | check-custom-dataset``: the data that an XTuner config names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from evomesh.config.reading.xtuner.tokenize_command import output_of, sources_of
from evomesh.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from evomesh.config.loader import LoadedConfig
    from evomesh.data.prepare.conversations import ChatOptions
    from evomesh.data.prepare.read_conversation import RecordSchema
    from evomesh.data.prepare.tokenize import TextOptions

ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A config file, or a name that list-cfg prints."
    ),
]


def tokenize(config: ConfigArgument) -> None:
    """Make the token files of the raw data that CONFIG names; those that are of the same data are left alone."""
    loaded = _load(config)
    if not loaded.preparation:
        print(
            f"{config}: nothing to do, it names token files: {loaded.config.data.train_folder}"
        )
    make_token_files(loaded, is_alone=True)


def make_token_files(loaded: LoadedConfig, *, is_alone: bool = False) -> None:
    """Tokenize the raw data of a config where its token files do not exist, or are of other data.

    Args:
        is_alone: no other process does the same; None of the launcher's variables is looked at then.
    Raises:
        UserError: this is one of several processes, or a run has trained on the token files of other data.
    """
    from evomesh.train.launchers import detect

    process = None if is_alone else detect(os.environ)
    several = process is not None and process.world_size > 1
    compares = process is None or process.rank == 0  # once: it reads all the data
    for command in loaded.preparation:
        output = output_of(command)
        changes: list[str] = []
        if output.exists():
            changes = changes_of(command) if compares else []
            if not changes:
                continue
            _refuse_trained(loaded, output, changes)
        # Tokenizing is not shared out over ranks.
        if several:
            raise _not_by_ranks(loaded, output, changes)
        if changes:
            print(f"{output} is made anew: {'; '.join(changes)}", file=sys.stderr)
        run_tokenize(command)
    if compares:
        _remove_left_over(loaded)


def _not_by_ranks(loaded: LoadedConfig, output: Path, changes: list[str]) -> UserError:
    """Return the error of one of several ranks whose token files are missing, or of other data."""
    found = "are of other data" if changes else "do not exist yet"
    details = "; ".join([str(output), *changes])
    return UserError(
        f"the token files of the raw data {found}: {details}",
        where=loaded.path,
        fix=f"make them once, before training: evomesh xtuner tokenize {loaded.path}",
        code="EVO-DATA-001",
    )


def _remove_left_over(loaded: LoadedConfig) -> None:
    """Remove the token files of raw data that the config names no more, since training reads the whole folder."""
    outputs = {output_of(command) for command in loaded.preparation}
    for folder in {output.parent for output in outputs}:
        for path in sorted(folder.glob("dataset*.bin")):
            if path not in outputs:
                _remove(loaded, path)


def _remove(loaded: LoadedConfig, path: Path) -> None:
    change = "the config has no such dataset any more"
    _refuse_trained(loaded, path, [change])
    print(f"{path} is removed: {change}", file=sys.stderr)
    for suffix in ("", ".meta", ".json"):
        file = Path(f"{path}{suffix}")
        file.unlink(missing_ok=True)


def _refuse_trained(loaded: LoadedConfig, output: Path, changes: list[str]) -> None:
    """Refuse to replace a token file that a run of the config's folder has trained on.

    Raises:
        UserError: the folder has checkpoints.
    """
    from evomesh.checkpoint.native.find import SaveFolder

    ckpt = loaded.config.ckpt
    folder = ckpt.save_ckpt_folder
    if folder is None:
        return
    saved = SaveFolder.open(folder, ckpt.snapshot_ckpt_folder).candidates()
    if saved:
        shown = folder.removeprefix("local:")
        raise UserError(
            f"the raw data differs from what this run has trained on until step {saved[0].step}: {'; '.join(changes)}",
            where=str(output),
            expected=f"the same data as long as {shown} has checkpoints",
            fix=f"take another folder (--work-dir), or remove {shown}, or undo the change",
            code="EVO-DATA-027",
        )


def changes_of(command: Sequence[str]) -> list[str]:
    """Return what makes a command's token file, which exists, another one than it would be now, in words.

    A file without a record, or whose sources are not on this machine any more, is taken as it is.
    """
    from evomesh.data.prepare.outdated import changes_since
    from evomesh.data.records.source_files import find_source_files
    from evomesh.data.token_files.fingerprint import read_fingerprint
    from evomesh.data.tokenizer import load_tokenizer

    record = read_fingerprint(output_of(command))
    if record is None:
        return []
    position = command.index("--output")
    names = command[position::2]
    values = dict(zip(names, command[position + 1 :: 2], strict=True))
    try:
        files = find_source_files(sources_of(command))
    except UserError as error:
        print(f"not compared with its sources: {error}", file=sys.stderr)
        return []
    tokenizer = load_tokenizer(values["--tokenizer"])
    options = _options_of(values)
    return changes_since(record, files, tokenizer, options)


def _options_of(values: Mapping[str, str]) -> ChatOptions | TextOptions:
    """Return the options of a command line that ``raw_data`` wrote."""
    from evomesh.data.prepare.conversations import ChatOptions
    from evomesh.data.prepare.tokenize import TextOptions

    if values["--format"] == "text":
        return TextOptions()
    return ChatOptions(
        cast("RecordSchema", values["--format"]),
        values["--chat-template"],
        max_length=int(values["--max-length"]),
    )


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
