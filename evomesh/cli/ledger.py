"""``evomesh ledger``: look up which documents a step is trained on, and in which steps a document is used."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.config.schema import Config
    from evomesh.config.step_values import StepRanges
    from evomesh.data.packing.ledger import LedgerEntry, StepLedger
    from evomesh.data.tokenizer import Tokenizer


ConfigArgument = Annotated[str, typer.Argument(help="The run's Python config file.")]
GpusOption = Annotated[
    int | None,
    typer.Option(min=1, help="Processes of the run [default: one data-parallel rank]."),
]
StepOption = Annotated[
    int | None, typer.Option(min=0, help="List the documents of this step.")
]
RankOption = Annotated[
    int | None, typer.Option(min=0, help="Of this data-parallel rank only.")
]
DocumentOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE:ROW",
        help="List the uses of this document; rows are counted from 0.",
    ),
]
UntilOption = Annotated[
    int | None,
    typer.Option(min=1, help="With --document: look at so many steps [default: all]."),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", "-t", help="Also show the text of each part."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a config value; repeatable.",
    ),
]


def ledger(
    config: ConfigArgument,
    gpus: GpusOption = None,
    step: StepOption = None,
    rank: RankOption = None,
    document: DocumentOption = None,
    until: UntilOption = None,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Look up which documents a step uses.

    Lists the parts of documents that a step is trained on, or the steps in which a
    document is used. The answer is computed from config and data, so the run need not
    have happened yet.
    """
    if (step is None) == (document is None):
        raise UserError("exactly one of --step and --document is needed")

    from evomesh.config.loader import load_config
    from evomesh.data.tokenizer import load_tokenizer

    settings = load_config(config, overrides or []).config
    lookup = _open_ledger(settings, gpus)
    if step is not None:
        _check_step(step, settings)
        entries = lookup.step(step, _check_rank(rank, lookup.dp_size))
    else:
        file, row = _parse_document(document or "")
        last_step = settings.data.total_steps
        entries = lookup.uses(file, row, min(until or last_step, last_step))
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    show = (
        _as_json if as_json else partial(_as_text, skipped=settings.data.skip_batches)
    )
    count = 0
    for count, entry in enumerate(entries, 1):  # noqa: B007
        typer.echo(show(entry))
        if loaded is not None:
            typer.echo(f"    {_text(entry, lookup, loaded)!r}")
    if not count and not as_json:
        typer.echo("not used in these steps")


def _open_ledger(settings: Config, gpus: int | None) -> StepLedger:
    from evomesh.config.layout import axis_sizes
    from evomesh.data.packing.ledger import StepLedger
    from evomesh.data.packing.staged import open_training_corpus

    if settings.data.type == "streaming":
        raise UserError(
            "the order of streamed text is only known while it is read",
            where="data.type",
            fix="tokenize the data first: evomesh tokenize",
        )
    parallel = settings.parallel
    processes = gpus or parallel.tensor.size * parallel.pipeline.size
    corpus = open_training_corpus(settings.data, settings.model.vocab_size)
    return StepLedger(corpus, axis_sizes(parallel, processes).dp)


def _check_step(step: int, settings: Config) -> None:
    if step >= settings.data.total_steps:
        last = settings.data.total_steps - 1
        raise UserError(
            f"the run has no step {step}",
            where="--step",
            expected=f"0 to {last} (data.total_steps)",
        )


def _check_rank(rank: int | None, dp_size: int) -> int | None:
    if rank is not None and rank >= dp_size:
        raise UserError(
            f"no data-parallel rank {rank}",
            where="--rank",
            expected=f"0 to {dp_size - 1}",
        )
    return rank


def _parse_document(text: str) -> tuple[str, int]:
    file, colon, row = text.rpartition(":")
    if not colon or not row.isdigit():
        raise UserError(
            f"found {text!r}",
            where="--document",
            expected="FILE:ROW, such as en/data.bin:12",
        )
    return file, int(row)


def _as_json(entry: LedgerEntry) -> str:
    return json.dumps(asdict(entry))


def _as_text(entry: LedgerEntry, skipped: StepRanges | None) -> str:
    note = " (skipped: data.skip_batches)" if skipped and entry.step in skipped else ""
    return (
        f"step {entry.step} rank {entry.rank} micro-batch {entry.micro_batch} pack {entry.pack} at {entry.offset}: "
        f"{entry.file} row {entry.row} tokens {entry.start}..{entry.stop - 1}{note}"
    )


def _text(entry: LedgerEntry, lookup: StepLedger, tokenizer: Tokenizer) -> str:
    tokens = lookup.corpus.read(entry.pack).tokens
    end = entry.offset + entry.stop - entry.start
    return tokenizer.decode(tokens[entry.offset : end].tolist())
