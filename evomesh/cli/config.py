"""``evomesh config``: check, show, list and copy config files, without importing torch."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from evomesh.errors import ConfigError, UserError

if TYPE_CHECKING:  # commands import what they need, so that `evomesh --help` is there at once
    from evomesh.config.loader import LoadedConfig

app = typer.Typer(no_args_is_help=True, add_completion=False)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A Python config file, such as configs/7B_sft.py.")
]
OverridesOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value; repeatable.")
]
GpusOption = Annotated[int | None, typer.Option("--gpus", min=1, help="Processes of the whole run.")]


@app.command()
def check(config: ConfigArgument, overrides: OverridesOption = None, gpus: GpusOption = None) -> None:
    """Apply every rule to CONFIG and print all problems, each with a fix; exit code 2 if there are any."""
    from evomesh.config.layout import check_world
    from evomesh.config.loader import load_config
    from evomesh.config.schema import ModelFamily

    loaded = load_config(config, overrides or [])
    if loaded.config.model.model_type not in get_args(ModelFamily):
        _check_custom_model(loaded)
    warnings = [*loaded.warnings, *(check_world(loaded.config, gpus) if gpus else [])]
    for words in warnings:
        typer.echo(f"warning: {words}")
    typer.echo(
        f"{config}: ok"
        + (f", {len(warnings)} warning{'s' if len(warnings) != 1 else ''}" if warnings else "")
    )


def _check_custom_model(loaded: LoadedConfig) -> None:
    """Check the parameters of a registered model; whoever registers one has imported torch already."""
    from evomesh.models.registry import check_arguments

    try:
        check_arguments(loaded.config.model)
    except ConfigError as error:
        raise ConfigError(error.problems, path=loaded.path) from None


@app.command()
def show(
    config: ConfigArgument,
    overrides: OverridesOption = None,
    gpus: GpusOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: config, origins, derived, warnings.")
    ] = False,
    explain_key: Annotated[
        str | None,
        typer.Option(
            "--explain", metavar="KEY", help="Print what one key means and where its value comes from."
        ),
    ] = None,
) -> None:
    """Print every resolved value of CONFIG, where it came from, and the sizes derived from them."""
    from evomesh.config.json_codec import encode_json
    from evomesh.config.layout import check_world
    from evomesh.config.loader import load_config
    from evomesh.config.reading.draft import leaves
    from evomesh.config.reading.spellings import written_key
    from evomesh.config.record import config_to_dict

    loaded = load_config(config, overrides or [])
    if explain_key is not None:
        from evomesh.config.explain import explain

        for label, text in explain(loaded, explain_key):
            typer.echo(f"{label:<12} {text}")
        return
    warnings = [*loaded.warnings, *(check_world(loaded.config, gpus) if gpus else [])]
    figures = derived(loaded, gpus or 1)
    if as_json:
        document = {
            "config": encode_json(config_to_dict(loaded.config)),
            "origins": loaded.origins,
            "derived": figures,
            "warnings": warnings,
        }
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    rows = [
        (key, _value(value), loaded.origins.get(key, "default"))
        for resolved, value in leaves(config_to_dict(loaded.config))
        for key in [written_key(resolved)]
    ]
    _table(("key", "value", "from"), rows)
    typer.echo()
    _table(("derived", "value"), [(name, _value(value)) for name, value in figures.items()])
    for words in warnings:
        typer.echo(f"warning: {words}")


@app.command("list")
def list_configs() -> None:
    """List the configs that are shipped with evomesh, one line each."""
    rows = []
    for path in shipped_configs():
        lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
        rows.append((path.stem, lines[0] if lines else "", str(path)))
    _table(("name", "what it is", "file"), rows)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A name that `evomesh config list` shows.")],
    dest: Annotated[str, typer.Argument(help="New file, or a folder to put it in.")],
) -> None:
    """Copy a shipped config and its base files, to edit it."""
    known = {path.stem: path for path in shipped_configs()}
    source = known.get(name.removesuffix(".py"))
    if source is None:
        raise UserError(f"no config named {name!r}", expected=f"one of {', '.join(known)}")
    target = Path(dest)
    if target.is_dir():
        target /= source.name
    if target.exists():
        raise UserError("exists already", where=str(target), fix="choose another name, or remove it first")
    if target.suffix != ".py" or not target.parent.is_dir():
        raise UserError("cannot be written", where=dest, expected="an existing folder, or NAME.py in one")
    bases = {path: target.parent / path.relative_to(source.parent) for path in _base_files(source)}
    for path, copied in bases.items():
        if copied.exists() and copied.read_bytes() != path.read_bytes():
            raise UserError(
                "exists already, with other content", where=str(copied), fix="choose another folder"
            )
    for path, copied in {**bases, source: target}.items():
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)
        typer.echo(f"{copied}")


def shipped_configs() -> list[Path]:
    """Return the shipped configs: next to the package in a checkout, in the environment's share folder if installed."""
    checkout = Path(__file__).resolve().parents[2] / "configs"
    installed = Path(sys.prefix) / "share" / "evomesh" / "configs"
    for folder in (checkout, installed):
        if (folder / "7B_sft.py").exists():
            return sorted(path for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return []


def _base_files(config: Path) -> list[Path]:
    """Return the file that ``_base_ = "..."`` of a shipped config names; none for a config that is whole."""
    for node in ast.parse(config.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_base_":
            return [config.parent / ast.literal_eval(node.value)]
    return []


def derived(loaded: LoadedConfig, gpus: int) -> dict[str, Any]:
    """Return the sizes derived from the config for ``gpus`` processes."""
    from evomesh.config.layout import data_parallel_size
    from evomesh.config.size import parameter_count, parameter_counts, tokens_per_step

    config = loaded.config
    dp = data_parallel_size(config.parallel, gpus)
    figures: dict[str, Any] = {
        "gpus": gpus,
        "data-parallel size": dp,
        "packed length (tokens)": config.data.packed_length,
        "tokens per step": tokens_per_step(config, dp),
        "tokens in all": tokens_per_step(config, dp) * config.data.total_steps,
        "head width": config.model.head_dim,
        "feed-forward width": config.model.mlp_width,
    }
    total = parameter_count(config.model)
    if total is None:
        return figures | {"parameters": "known only to the model's builder"}
    return (
        figures
        | {"parameters": total}
        | {f"  {part}": n for part, n in parameter_counts(config.model).items()}
    )


def _value(value: Any) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool) and value >= 10**6
        else str(value)
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A rich table on a terminal; aligned plain text for a pipe."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*head, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*[Text(cell, style="" if i < 2 else "dim") for i, cell in enumerate(row)])
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
