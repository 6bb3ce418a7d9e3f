"""``evomesh data``: inspect, verify, repair and order tokenized datasets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli import data_report
from evomesh.cli.command_names import CommandGroup
from evomesh.quantities import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evomesh.config.data import DataConfig
    from evomesh.data.tokenizer import Tokenizer

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False)
app.command("report")(data_report.report)

MAX_SAMPLE_TOKENS = 400  # of a decoded document

DataPathArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A .bin file, or a folder with such files."),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", "-t", help="Decode samples with this tokenizer."),
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", help="Use the data folder and packing of this config."),
]
SeqLenOption = Annotated[
    int, typer.Option(min=1, help="Maximum attention segment, in tokens.")
]
MicroBszOption = Annotated[
    int, typer.Option(min=1, help="Pack length in multiples of seq-len.")
]
MinLengthOption = Annotated[
    int, typer.Option(min=0, help="Leave out documents with fewer tokens.")
]


def _section(
    config: str | None,
    path: str | None,
    seq_len: int,
    micro_bsz: int,
    min_length: int,
    one_sample: bool,
) -> tuple[DataConfig, str]:
    """Return the data section, from a config or from options, and the path of the data."""
    from evomesh.config.data import DataConfig
    from evomesh.errors import UserError

    if config is not None:
        from evomesh.config.loader import load_config

        section = load_config(config).config.data
        folder = path or section.train_folder
        if folder is None:
            raise UserError(
                "the config has no train_folder",
                where=config,
                fix="give a PATH",
                code="EVO-CLI-009",
            )
        return section, folder
    if path is None:
        raise UserError(
            "no data to inspect",
            expected="a PATH, or --config CONFIG",
            code="EVO-CLI-004",
        )
    section = DataConfig(
        seq_len=seq_len,
        micro_bsz=micro_bsz,
        min_length=min_length,
        pack_sample_into_one=one_sample,
        train_folder=path,
    )
    return section, path


@app.command()
def inspect(
    path: DataPathArgument,
    config: ConfigOption = None,
    seq_len: SeqLenOption = 2048,
    micro_bsz: MicroBszOption = 1,
    min_length: MinLengthOption = 0,
    tokenizer: TokenizerOption = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Number of documents to decode.")
    ] = 3,
) -> None:
    """Show counts, lengths, ids and decoded samples. Tokens that are not targets are dim."""
    import numpy as np

    from evomesh.data.inspect import (
        dimmed,
        histogram,
        id_summary,
        open_files,
        open_packs,
        summary,
    )
    from evomesh.data.tokenizer import load_tokenizer

    section, _ = _section(config, path, seq_len, micro_bsz, min_length, False)
    files = open_files(path)
    for file in files:
        facts = summary(file)
        print(
            f"{facts['file']}: {counted(facts['documents'], 'document')}, {counted(facts['tokens'], 'token')} "
            f"(shortest {facts['shortest']:,}, median {facts['median']:,}, longest {facts['longest']:,}), "
            f"{facts['bytes']:,} bytes"
        )
    print(histogram(np.concatenate([np.asarray(file.lengths) for file in files])))
    print(id_summary(files))
    packs = open_packs(path, section)
    read = sum(plan.tokens for plan in packs.plans)
    lost = sum(plan.dropped for plan in packs.plans)
    print(
        f"packs of {section.packed_length:,} tokens: {len(packs):,}; tails left out: {counted(lost, 'token')} "
        f"({lost / max(1, read):.1%} of those that pass min_length {section.min_length})"
    )
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        _warn_of_other_tokenizer([file.path for file in files], loaded)
        first = files[0]
        spread = np.linspace(0, len(first) - 1, samples).astype(np.int64)
        for number in np.unique(spread):
            ids = first.read(np.array([number]))
            line = first.row(int(number)) + 1
            print(f"--- {first.name} line {line}, {counted(len(ids), 'token', '')}")
            shown = ids[:MAX_SAMPLE_TOKENS]  # negative ids are not targets
            text = dimmed(np.abs(shown), shown > 0, loaded)
            typer.echo(text + (" ..." if len(ids) > len(shown) else ""))


@app.command()
def show(
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", help="A .bin file, or a training folder."),
    ] = None,
    pack: Annotated[
        int, typer.Option("--pack", min=0, help="Number of the pack, from 0.")
    ] = 0,
    config: ConfigOption = None,
    seq_len: SeqLenOption = 2048,
    micro_bsz: MicroBszOption = 1,
    min_length: MinLengthOption = 0,
    one_sample: Annotated[
        bool,
        typer.Option(
            "--pack-sample-into-one",
            help="Split segments every seq-len tokens, across documents.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object.")
    ] = False,
    tokenizer: TokenizerOption = None,
) -> None:
    """Show exactly what the model sees in one pack."""
    import orjson

    from evomesh.data.inspect import open_packs, pack_json, pack_text
    from evomesh.data.token_files.folders import find_bins
    from evomesh.data.tokenizer import load_tokenizer
    from evomesh.errors import UserError

    section, folder = _section(config, path, seq_len, micro_bsz, min_length, one_sample)
    packs = open_packs(folder, section)
    if pack >= len(packs):
        raise UserError(
            f"there is no pack {pack}: the data has {len(packs)} of {section.packed_length:,} tokens",
            where=folder,
            expected=f"--pack below {len(packs)}"
            if len(packs)
            else "more data, or a shorter --seq-len",
            code="EVO-CLI-003",
        )
    found = packs.read(pack)
    if as_json:
        print(orjson.dumps(pack_json(found)).decode())
    else:
        print(f"pack {pack} of {len(packs)}, {section.packed_length} tokens")
        loaded = load_tokenizer(tokenizer) if tokenizer else None
        if loaded is not None:
            _warn_of_other_tokenizer([file.path for file in find_bins(folder)], loaded)
        typer.echo(pack_text(found, loaded))


def _warn_of_other_tokenizer(paths: Sequence[Path], tokenizer: Tokenizer) -> None:
    """Print a warning if another tokenizer made some of the token files: their texts are wrong."""
    from evomesh.data.token_files.fingerprint import other_tokenizer_warning

    name = str(tokenizer.path)
    warning = other_tokenizer_warning(paths, tokenizer.hash, name)
    if warning is not None:
        typer.echo(f"warning: {warning}", err=True)


@app.command()
def verify(
    path: DataPathArgument,
    tokenizer: TokenizerOption = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Report ids at or above this.")
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option(
            help="Validation data to check for documents that are also in PATH."
        ),
    ] = None,
    min_length: MinLengthOption = 0,
    config: Annotated[
        str | None,
        typer.Option(help="Check too that this config can train on the data."),
    ] = None,
) -> None:
    """Check every line of token files. Exit code 1 if there are problems.

    Checks offsets, counts, ids, targets, lengths, repeats, tokenized JSON, and overlap
    with validation data.
    """
    from evomesh.data.token_files.verify import verify as run
    from evomesh.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer else None
    section = None
    valid_min_length = 0
    if config is not None:
        from evomesh.config.loader import load_config

        whole = load_config(config).config
        section = whole.data
        vocab_size = vocab_size or whole.model.vocab_size
        min_length = min_length or section.min_length
        valid_min_length = section.valid_min_length
    scans, problems = run(
        path,
        vocab_size=vocab_size,
        tokenizer=loaded,
        valid=valid,
        min_length=min_length,
        valid_min_length=valid_min_length,
    )
    if section is not None and not problems:
        # Imports torch, which takes longer than checking a small file.
        from evomesh.data.build import find_training_problems

        problems = find_training_problems(section, path)
    for found in scans:
        print(
            f"{found.path}: {counted(len(found.offsets), 'document')}, {counted(found.tokens, 'token')}, "
            f"largest id {found.max_id}"
        )
        for note in found.notes:
            print(f"note: {note}")
    _report_problems(problems)


def _report_problems(problems: list[str]) -> None:
    """Print the problems of a dataset; with any, exit with code 1."""
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        print(counted(len(problems), "problem"))
        sys.exit(1)
    print("no problems found")


@app.command()
def repair(path: DataPathArgument) -> None:
    """Rebuild the .meta from the lines. A torn last line is moved to a .torn file."""
    from evomesh.data.token_files.repair import repair_path

    for message in repair_path(path):
        print(message)


@app.command()
def cache(path: DataPathArgument) -> None:
    """Cache the tokens of each file as a binary array. Training reads it instead of the lines."""
    from evomesh.data.inspect import open_files
    from evomesh.data.token_files.cache import write_cache

    for file in open_files(path):
        print(f"{file.path}.cache: {counted(write_cache(file.path), 'token')}")


@app.command()
def order(
    folder: Annotated[str, typer.Argument(help="Data folder.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="File to write.")
    ] = "data_order.txt",
    file_type: Annotated[
        str, typer.Option(help="Suffix of the files to list.")
    ] = ".bin",
) -> None:
    """Write a file for data.data_order_path. It lists the data files in their order, one relative path per line."""
    from evomesh.data.token_files.folders import write_order

    target = Path(output)
    count = write_order(folder, target, file_type)
    print(f"{output}: {counted(count, 'file')}")
