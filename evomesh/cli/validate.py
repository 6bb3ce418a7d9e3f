"""``evomesh validate``: losses of a checkpoint on the validation sets of a config, without training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomesh.cli.options import (
    EmaOption,
    LauncherOption,
    OptionalCheckpointOption,
    OverrideOption,
    RendezvousPortOption,
)
from evomesh.config.json_codec import float_word

if TYPE_CHECKING:
    from evomesh.train.validation_run import ValidationResult

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
# Figure of a set -> title of its column.
COLUMNS = {"loss": "loss", "plex": "perplexity", "acc": "accuracy", "bpb": "bits/byte"}


def validate(
    config: Annotated[
        str, typer.Argument(help="The Python config file of the model and its data.")
    ],
    checkpoint: OptionalCheckpointOption = None,
    overrides: OverrideOption = None,
    ema: EmaOption = False,
    as_json: JsonOption = False,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
) -> None:
    """Print loss, perplexity and accuracy of a checkpoint on each set of data.valid_folder.

    Without --checkpoint, of the newest checkpoint in the config's save folder, or of what its load_ckpt_info names.
    The figures are those of the run's own validation: equal to the bit in the same layout. Started as a run is: alone,
    with NPROC_PER_NODE=4, under torchrun or under srun, in any layout. Nothing is written.
    """
    import sys

    from rich.console import Console

    from evomesh.config.loader import load_config
    from evomesh.train.job import reporting_early_errors
    from evomesh.train.launchers import spawn_ranks
    from evomesh.train.validation_run import refuse_missing_folder, validate_checkpoint

    # What was asked for is printed to standard output, alone: it may be read as JSON.
    console = Console(file=sys.stderr)
    with reporting_early_errors(launcher, port):
        loaded = load_config(config, overrides or [])
        refuse_missing_folder(loaded)
        spawn_ranks(launcher, console=console)
        result = validate_checkpoint(
            loaded,
            checkpoint,
            ema=ema,
            launcher=launcher,
            port=port,
            console=console,
        )
    if result.rank == 0:
        typer.echo(as_object(result) if as_json else table_of(result))


def as_object(result: ValidationResult) -> str:
    """Return the result as one JSON object, its figures under the names of metrics.jsonl."""
    figures = {}
    for name, value in result.figures.items():
        # JSON has no NaN and no infinity; metrics.jsonl has the same words.
        figures[name] = float_word(value)
    values: dict[str, Any] = {
        "source": result.source,
        "step": result.step,
        "ranks": result.world_size,
        "figures": figures,
    }
    return json.dumps(values, ensure_ascii=False, allow_nan=False)


def table_of(result: ValidationResult) -> str:
    """Return one line per set, below a line that says of which weights they are."""
    titles = ["set", *COLUMNS.values()]
    rows = [titles]
    for name in _sets_of(result.figures):
        row = [name]
        for kind in COLUMNS:
            value = result.figures.get(f"val/{name}_{kind}")
            row.append(_shown(value))
        rows.append(row)
    width = max(len(row[0]) for row in rows)
    lines = [result.source]
    for first, *cells in rows:
        aligned = [f"{cell:>10}" for cell in cells]
        line = "  ".join([first.ljust(width), *aligned])
        lines.append(line)
    return "\n".join(lines)


def _sets_of(figures: dict[str, float]) -> list[str]:
    """Return the names of the sets: en of ``val/en_loss``."""
    suffix = "_loss"
    losses = [name for name in figures if name.endswith(suffix)]
    return [name.removeprefix("val/").removesuffix(suffix) for name in losses]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
