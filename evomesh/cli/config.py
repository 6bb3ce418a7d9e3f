"""``evomesh config``: check, show, list and copy config files, without importing torch."""

from __future__ import annotations

import ast
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from evomesh.cli.command_names import CommandGroup
from evomesh.cli.config_paths import path_warnings
from evomesh.cli.options import OverrideOption
from evomesh.errors import ConfigError, UserError
from evomesh.outside_errors import not_written
from evomesh.quantities import counted

# Commands import what they need, so that `evomesh --help` is there at once.
if TYPE_CHECKING:
    from evomesh.config.loader import LoadedConfig

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False)

ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A Python config file, such as configs/7B_sft.py."
    ),
]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", min=1, help="Number of processes in the run.")
]


@app.command()
def check(
    config: ConfigArgument,
    overrides: OverrideOption = None,
    gpus: GpusOption = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print every warning in full.")
    ] = False,
) -> None:
    """Check CONFIG against every rule. Prints all problems, each with a fix; exit code 2 if there are any.

    Folders and files that it names and that are not on this machine are warnings.
    """
    from evomesh.config.layout import check_world
    from evomesh.config.loader import load_config
    from evomesh.config.saving import saving_warning
    from evomesh.config.schema import ModelFamily
    from evomesh.config.warning_lines import warning_lines

    loaded = load_config(config, overrides or [])
    is_built_in = loaded.config.model.model_type in get_args(ModelFamily)
    if not is_built_in:
        _check_custom_model(loaded)
    if loaded.config.ckpt.enable_internevo2hf_ckpt:
        _check_export(loaded)
    # A custom builder may take long, or the memory of the model: there the run checks.
    if is_built_in and loaded.config.adam.groups:
        _check_groups(loaded)
    warnings = list(loaded.warnings)
    if gpus is not None:
        warnings += check_world(loaded.config, gpus)
    shown = warnings if verbose else warning_lines(warnings, config)
    unsaved = saving_warning(loaded.config.ckpt)
    of_place = [] if unsaved is None else [unsaved]
    of_place += path_warnings(loaded)
    for words in (*shown, *of_place):
        typer.echo(f"warning: {words}")
    warnings += of_place
    count = ""
    if warnings:
        count = f", {counted(len(warnings), 'warning')}"
    typer.echo(f"{config}: ok{count}")


def _check_custom_model(loaded: LoadedConfig) -> None:
    """Check the parameters of a registered model. Its builder was registered in this process, so torch is loaded."""
    from evomesh.models.registry import check_arguments

    try:
        check_arguments(loaded.config.model)
    except ConfigError as error:
        raise ConfigError(error.problems, path=loaded.path) from None


def _check_groups(loaded: LoadedConfig) -> None:
    """Check that each of ``adam.groups`` has a parameter; their names need the model, here without weights."""
    from evomesh.models.registry import build_model
    from evomesh.optim.group_table import check_groups

    model = loaded.config.model.model_copy(update={"compile": False})
    trained = [
        name
        for name, parameter in build_model(model, device="meta").named_parameters()
        if parameter.requires_grad
    ]
    check_groups(loaded.config.adam.groups, trained)


def _check_export(loaded: LoadedConfig) -> None:
    """Check that the checkpoints of a run can be exported; the rules of that need torch."""
    from evomesh.checkpoint.huggingface.export import refuse_unexportable_run

    refuse_unexportable_run(loaded.config)


@app.command()
def show(
    config: ConfigArgument,
    overrides: OverrideOption = None,
    gpus: GpusOption = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object: config, origins, derived, warnings."
        ),
    ] = False,
    explain_key: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="KEY",
            help="Print only the meaning of one key or section, its value and origin.",
        ),
    ] = None,
    lr: Annotated[
        bool,
        typer.Option("--lr", help="Print only the learning rate, at a few steps."),
    ] = False,
) -> None:
    """Print every value of CONFIG and where it was set. Also prints sizes derived from them."""
    from evomesh.config.json_codec import encode_json
    from evomesh.config.layout import check_world
    from evomesh.config.loader import load_config
    from evomesh.config.record import config_to_dict

    loaded = load_config(config, overrides or [])
    if explain_key is not None:
        _print_explanation(loaded, explain_key)
        return
    if lr:
        _show_learning_rate(loaded, as_json)
        return
    warnings = [*loaded.warnings, *(check_world(loaded.config, gpus) if gpus else [])]
    figures = derived(loaded, gpus)
    values = config_to_dict(loaded.config)
    if as_json:
        document = {
            "config": encode_json(values),
            "origins": loaded.origins,
            "derived": figures,
            "warnings": warnings,
        }
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    _print_values(loaded, values)
    _print_figures(loaded, figures)
    if gpus is None:
        typer.echo(
            "derived for the fewest gpus of this layout; --gpus sets another number"
        )
    for words in warnings:
        typer.echo(f"warning: {words}")


def _print_values(loaded: LoadedConfig, values: dict[str, Any]) -> None:
    """Print every key with its value and where that was set."""
    from evomesh.config.reading.draft import leaves
    from evomesh.config.reading.spellings import written_key

    head = ("key", "value", "from")
    rows = []
    for resolved, value in leaves(values):
        key = written_key(resolved)
        shown = _format_value(value)
        origin = loaded.origins.get(key, "default")
        row = (key, shown, origin)
        rows.append(row)
    _print_table(head, rows)
    typer.echo()


def _show_learning_rate(loaded: LoadedConfig, as_json: bool) -> None:
    """Print the learning rate at the borders of the schedule and between them."""
    from evomesh.optim.groups import hidden_lr_scale
    from evomesh.optim.schedule import learning_rate, preview_steps

    config = loaded.config
    schedule = config.lr_scheduler
    total_steps = config.data.total_steps
    if config.data.epochs is not None:
        raise UserError(
            "the length of the run follows from the data, which this command does not open",
            where="data.epochs",
            fix=f"give a length: --set data.epochs=None --set data.total_steps={total_steps}",
            code="EVO-CONFIG-013",
        )
    rates = {}
    for step in preview_steps(schedule, 0, total_steps):
        rates[step] = learning_rate(step, schedule, config.adam, total_steps)
    groups = config.adam.groups
    scales = {group.pattern: group.lr_scale for group in groups}
    if config.model.mup.is_on:
        multiplier = config.model.width_multiplier
        scales["muP: hidden"] = hidden_lr_scale(config.optimizer.type, multiplier)
    if as_json:
        document: dict[str, Any] = {"type": schedule.type, "lr": rates}
        if scales:
            document["lr_scales"] = scales
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    rows = []
    for step, rate in rates.items():
        scaled = [f"{rate * scale:.6g}" for scale in scales.values()]
        rows.append((f"{step:,}", f"{rate:.6g}", *scaled))
    _print_table(("step", "lr", *scales), rows)
    typer.echo(
        f"{schedule.type}, {counted(total_steps, 'step')}; a skipped step does not count"
    )


@app.command("list")
def list_configs() -> None:
    """List the configs shipped with evomesh."""
    rows = []
    for path in shipped_configs():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        description = (ast.get_docstring(tree) or "").partition("\n")[0]
        rows.append((path.stem, description, str(path)))
    _print_table(("name", "description", "file"), rows)


@app.command()
def copy(
    name: Annotated[
        str, typer.Argument(help="A name that `evomesh config list` shows.")
    ],
    dest: Annotated[str, typer.Argument(help="New file, or a folder to put it in.")],
) -> None:
    """Copy a shipped config and its base files."""
    known = {path.stem: path for path in shipped_configs()}
    source = known.get(name.removesuffix(".py"))
    if source is None:
        theirs = {path.stem for path in xtuner_configs()}
        is_theirs = name.removesuffix(".py") in theirs
        raise UserError(
            f"no config named {name!r}",
            expected=f"one of {', '.join(known)}",
            fix=f"it is a config of XTuner: evomesh xtuner copy-cfg {name} {dest}"
            if is_theirs
            else "",
            code="EVO-CLI-008",
        )
    target = Path(dest)
    if target.is_dir():
        target /= source.name
    if target.suffix != ".py" or not target.parent.is_dir():
        raise UserError(
            "cannot be written",
            where=str(target),
            expected="an existing folder, or NAME.py in one",
            code="EVO-CLI-006",
        )
    from evomesh.cli.config_copy import copy_with_base

    for written in copy_with_base(source, target):
        typer.echo(str(written))


@app.command()
def translate(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A config of XTuner.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New file.")],
    overrides: OverrideOption = None,
) -> None:
    """Write CONFIG, which is XTuner's, as a config of evomesh; a comment on each line says where it comes from."""
    from evomesh.config.loader import load_config
    from evomesh.config.reading.xtuner.file import is_xtuner_file
    from evomesh.config.write_config import config_text

    config = find_named_config(config)
    loaded = load_config(config, overrides or [])
    if not is_xtuner_file(config):
        raise UserError(
            "is not a config of XTuner: evomesh reads it as it is",
            where=config,
            code="EVO-CONFIG-014",
        )
    if out.suffix != ".py" or out.exists():
        raise UserError(
            "exists already" if out.exists() else "does not end in .py",
            where=str(out),
            expected="a new file, NAME.py",
            code="EVO-CLI-006",
        )
    try:
        out.write_text(config_text(loaded), encoding="utf-8")
    except OSError as error:
        raise not_written(out, error) from None
    print(f"wrote {out}")
    for command in loaded.preparation:
        print(f"tokenize its raw data first: evomesh {' '.join(command)}")


def xtuner_configs() -> list[Path]:
    """Return the shipped configs that have XTuner's names."""
    return sorted(
        path
        for folder in _config_folders()
        for path in (folder / "xtuner").glob("*.py")
    )


def xtuner_config(name: str) -> Path:
    """Return the shipped config of one of XTuner's names.

    Raises:
        UserError: there is none; the nearest names are given.
    """
    known = {path.stem: path for path in xtuner_configs()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise UserError(
            f"no config named {name!r}",
            expected=f"one of {', '.join(known)}",
            fix=f"did you mean {' or '.join(near)}?"
            if near
            else "evomesh xtuner list-cfg",
            code="EVO-CLI-008",
        )
    return known[name]


def find_named_config(name: str) -> str:
    """Return the config file that a path, or one of XTuner's names, stands for."""
    if Path(name).exists() or "/" in name or name.endswith(".py"):
        return name
    return str(xtuner_config(name))


def shipped_configs() -> list[Path]:
    """Return the shipped configs in our own language."""
    return [
        path
        for folder in _config_folders()
        for path in sorted(folder.glob("*.py"))
        if not path.stem.startswith("_")
    ]


def _config_folders() -> list[Path]:
    """Return the folder of the shipped configs: of the checkout, else of the installed package."""
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "configs", package / "shipped_configs")
    return [folder for folder in folders if (folder / "7B_sft.py").exists()][:1]


def _print_explanation(loaded: LoadedConfig, key: str) -> None:
    """Print what a key does, in the user's language."""
    from evomesh.config.explain import explain
    from evomesh.error_codes.words import chosen_language

    language = chosen_language(encoding=sys.stdout.encoding)
    for label, text in explain(loaded, key, language):
        typer.echo(f"{label:<12} {text}")


def _print_figures(loaded: LoadedConfig, figures: dict[str, Any]) -> None:
    rows = [(name, _format_value(value)) for name, value in figures.items()]
    _print_table(("derived", "value"), rows)
    _print_stages(loaded, int(figures["data-parallel size"]))


def _print_stages(loaded: LoadedConfig, dp_size: int) -> None:
    """Print the table of data stages, if there are any, with what is wrong with them."""
    from evomesh.config.data_stages import (
        data_stage_problem,
        resolve_data_stages,
        stage_rows,
    )

    data = loaded.config.data
    stages = resolve_data_stages(data, dp_size)
    if not stages:
        return
    head, *rows = stage_rows(stages)
    typer.echo()
    _print_table(head, rows)
    problem = data_stage_problem(stages, data.total_steps)
    if problem:
        typer.echo(f"problem: {problem}")


def derived(loaded: LoadedConfig, gpus: int | None) -> dict[str, Any]:
    """Return the sizes derived from the config for ``gpus`` processes; None: the fewest that hold one copy."""
    from evomesh.config.data_stages import resolve_data_stages
    from evomesh.config.layout import data_parallel_size, smallest_world
    from evomesh.config.size import parameter_count, parameter_counts, tokens_per_step

    config = loaded.config
    processes = smallest_world(config.parallel) if gpus is None else gpus
    dp = data_parallel_size(config.parallel, processes)
    figures: dict[str, Any] = {
        "gpus": processes,
        "data-parallel size": dp,
        "packed length (tokens)": config.data.packed_length,
        "tokens per step": tokens_per_step(config, dp),
        "tokens in total": tokens_per_step(config, dp) * config.data.total_steps,
        "head width": config.model.head_dim,
        "feed-forward width": config.model.mlp_width,
    }
    stages = resolve_data_stages(config.data, dp)
    if stages:
        figures["tokens in total"] = sum(stage.tokens for stage in stages)
        del figures["tokens per step"]
    if config.data.epochs is not None:  # the data decides, and it is not open
        del figures["tokens in total"]
        figures["passes over the data"] = config.data.epochs
    total = parameter_count(config.model)
    if total is None:
        return figures | {"parameters": "known only to the model's builder"}
    figures["parameters"] = total
    for part, count in parameter_counts(config.model).items():
        figures[f"  {part}"] = count
    return figures


def _format_value(value: Any) -> str:
    is_large = isinstance(value, int) and not isinstance(value, bool) and value >= 10**6
    return f"{value:,}" if is_large else str(value)


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a rich table on a terminal, aligned plain text elsewhere."""
    from evomesh.config.text_table import text_table

    if sys.stdout.isatty():
        _print_rich_table(head, rows)
    else:
        typer.echo(text_table([head, *rows]))


def _print_rich_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table whose columns after the second are dimmed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        *head,
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            style = "" if column < 2 else "dim"
            cells.append(Text(cell, style=style))
        table.add_row(*cells)
    Console().print(table)
