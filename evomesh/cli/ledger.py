"""``evomesh ledger``: look up which documents a step is trained on, and in which steps a document is used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from evomesh.errors import UserError
from evomesh.quantities import counted

if TYPE_CHECKING:
    from evomesh.config.step_values import StepRanges
    from evomesh.data.packing.ledger import LedgerEntry, StepLedger
    from evomesh.data.tokenizer import Tokenizer
    from evomesh.runs.ledger import RunData, RunPart


class FoundUse(NamedTuple):
    """A use of a document, and what it was looked up in."""

    part: RunPart
    lookup: StepLedger
    entry: LedgerEntry


ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG|RUN", help="The run's Python config file, or a run folder."
    ),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes of the run [default: those of RUN; one data-parallel rank].",
    ),
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
    have happened yet. Of a run folder, each step has the config and the ranks of the start
    that did it last, and the steps that were left out because of a spike are marked. Tokens
    are counted from 0, and the last one is part of the range.
    """
    if (step is None) == (document is None):
        raise UserError(
            "exactly one of --step and --document is needed", code="EVO-CLI-004"
        )

    from evomesh.data.tokenizer import load_tokenizer

    run = _data_of(config, gpus, overrides or [])
    if step is not None:
        found = _uses_of_step(run, step, rank)
    else:
        file, row = _parse_document(document or "")
        found = _uses_of_document(run, file, row, until)
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    show = _as_json if as_json else _as_text
    reasons: dict[int, str] = {}
    for part, lookup, entry in found:
        reason = _reason(entry.step, part.config.data.skip_batches, run.spikes)
        reasons[entry.step] = reason
        typer.echo(show(entry, reason))
        if loaded is not None:
            typer.echo(f"    {_text(entry, lookup, loaded)!r}")
    if not as_json:
        _summarize(reasons, is_step=step is not None)


def _data_of(config: str, gpus: int | None, overrides: list[str]) -> RunData:
    """Return the data of a run folder, or of the run that a config describes."""
    from evomesh.config.loader import load_config
    from evomesh.config.user import expand_home
    from evomesh.runs.ledger import RunData, RunPart, open_run_data

    if not expand_home(config).is_dir():
        settings = load_config(config, overrides).config
        parallel = settings.parallel
        ranks = gpus or parallel.tensor.size * parallel.pipeline.size
        steps = range(settings.data.total_steps)
        return RunData((RunPart(settings, ranks, steps),), frozenset())

    if overrides:
        raise UserError(
            "a run has been made with the values that it has",
            where="--set",
            expected="a config file",
            code="EVO-CLI-004",
        )
    run = open_run_data(config)
    if gpus is None:
        return run
    parts = tuple(replace(part, gpus=gpus) for part in run.parts)
    return replace(run, parts=parts)


def _uses_of_step(run: RunData, step: int, rank: int | None) -> Iterator[FoundUse]:
    """Yield what the ranks, or one of them, read in a step."""
    _check_step(step, run.parts[-1].steps.stop)
    [part] = [part for part in run.parts if step in part.steps]
    lookup = _open_ledger(part)
    checked = _check_rank(rank, lookup.dp_size)
    for entry in lookup.step(step, checked):
        yield FoundUse(part, lookup, entry)


def _uses_of_document(
    run: RunData,
    file: str,
    row: int,
    until: int | None,
) -> Iterator[FoundUse]:
    """Yield each use of a document in the first ``until`` steps, or in all."""
    for part in run.parts:
        steps = part.steps
        if until is not None:
            steps = range(steps.start, min(steps.stop, until))
        lookup = _open_ledger(part)
        for entry in lookup.uses(file, row, steps):
            yield FoundUse(part, lookup, entry)


def _reason(step: int, listed: StepRanges, spikes: frozenset[int]) -> str:
    """Return why a step is not trained on; "" if it is."""
    if step in listed:
        return "data.skip_batches"
    return "spike" if step in spikes else ""


def _summarize(reasons: Mapping[int, str], is_step: bool) -> None:
    """Print how often a document is used.

    Args:
        reasons: of each step that has been listed, why it is skipped.
    """
    if is_step:
        return
    skipped = sum(bool(reason) for reason in reasons.values())
    note = f", skipped in {skipped}" if skipped else ""
    typer.echo(f"used in {counted(len(reasons) - skipped, 'step')}{note}")


def _open_ledger(part: RunPart) -> StepLedger:
    from evomesh.config.layout import axis_sizes
    from evomesh.data.packing.ledger import StepLedger
    from evomesh.data.packing.staged import open_training_corpus

    settings = part.config
    if settings.data.type == "streaming":
        raise UserError(
            "the order of streamed text is only known while it is read",
            where="data.type",
            fix="tokenize the data first: evomesh tokenize",
            code="EVO-CLI-009",
        )
    corpus = open_training_corpus(settings.data, settings.model.vocab_size)
    return StepLedger(corpus, axis_sizes(settings.parallel, part.gpus).dp)


def _check_step(step: int, total_steps: int) -> None:
    if step >= total_steps:
        raise UserError(
            f"the run has no step {step}",
            where="--step",
            expected=f"0 to {total_steps - 1} (data.total_steps)",
            code="EVO-CLI-003",
        )


def _check_rank(rank: int | None, dp_size: int) -> int | None:
    if rank is not None and rank >= dp_size:
        raise UserError(
            f"no data-parallel rank {rank}",
            where="--rank",
            expected=f"0 to {dp_size - 1}",
            code="EVO-CLI-003",
        )
    return rank


def _parse_document(text: str) -> tuple[str, int]:
    file, colon, row = text.rpartition(":")
    if not colon or not row.isdigit():
        raise UserError(
            f"found {text!r}",
            where="--document",
            expected="FILE:ROW, such as en/data.bin:12",
            code="EVO-CLI-002",
        )
    return file, int(row)


def _as_json(entry: LedgerEntry, reason: str) -> str:
    note = {"skipped": reason} if reason else {}
    return json.dumps(asdict(entry) | note)


def _as_text(entry: LedgerEntry, reason: str) -> str:
    note = f" (skipped: {reason})" if reason else ""
    return (
        f"step {entry.step} rank {entry.rank} micro-batch {entry.micro_batch} pack {entry.pack} at {entry.offset}: "
        f"{entry.file} row {entry.row} tokens {entry.start}..{entry.stop - 1}{note}"
    )


def _text(entry: LedgerEntry, lookup: StepLedger, tokenizer: Tokenizer) -> str:
    tokens = lookup.corpus.read(entry.pack).tokens
    end = entry.offset + entry.stop - entry.start
    own_tokens = tokens[entry.offset : end]
    return tokenizer.decode(own_tokens.tolist())
