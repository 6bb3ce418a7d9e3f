"""``evomesh xtuner``: XTuner's command line. Its configs are read by every other command too."""

from __future__ import annotations

import shutil
import stat
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli import xtuner_convert, xtuner_data
from evomesh.cli.usage import XTunerGroup
from evomesh.cli.xtuner_train import train
from evomesh.errors import UserError
from evomesh.outside_errors import not_written

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    cls=XTunerGroup,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Its arguments are XTuner's, some of which (--resume [PATH], --cfg-options k=v ...)
# argparse alone can parse.
app.command(
    "train",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(train)
app.command("tokenize")(xtuner_data.tokenize)
app.command("log-dataset")(xtuner_data.log_dataset)
app.command("check-custom-dataset")(xtuner_data.check_custom_dataset)
app.add_typer(
    xtuner_convert.app,
    name="convert",
    help="Convert checkpoints to Hugging Face folders, and split them.",
)

SCRIPT = "#!{python}\nfrom evomesh.cli.xtuner import main\n\nmain()\n"


@app.command("list-cfg")
def list_cfg(
    pattern: Annotated[
        str, typer.Option("-p", "--pattern", help="Part of the names, in any case.")
    ] = "",
) -> None:
    """List the shipped configs that have XTuner's names."""
    from evomesh.cli.config import xtuner_configs

    names = [
        path.stem for path in xtuner_configs() if pattern.lower() in path.stem.lower()
    ]
    for name in names:
        print(name)
    if not names:
        raise UserError(
            f"no config's name contains {pattern!r}",
            where="--pattern",
            fix="evomesh xtuner list-cfg lists all",
            code="EVO-CLI-008",
        )


@app.command("copy-cfg")
def copy_cfg(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name that list-cfg prints.")
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder for NAME_copy.py.")
    ],
) -> None:
    """Copy a shipped config to DIR/NAME_copy.py, to edit it, and the file that it is based on."""
    from evomesh.cli.config import xtuner_config
    from evomesh.cli.config_copy import copy_with_base

    source = xtuner_config(name.removesuffix(".py"))
    target = folder / f"{source.stem}_copy.py"
    for written in copy_with_base(source, target):
        print(f"wrote {written}")


@app.command("install-command")
def install_command(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--into", help="Folder of the script [default: beside the evomesh command]."
        ),
    ] = None,
) -> None:
    """Write a script named xtuner that runs `evomesh xtuner`; an existing command of that name is left alone."""
    target = (folder or Path(sysconfig.get_path("scripts"))) / "xtuner"
    text = SCRIPT.format(python=sys.executable)
    existing = shutil.which("xtuner")
    if target.exists() and target.read_text(errors="replace") != text:
        raise UserError(
            "another command of this name is there",
            where=str(target),
            fix="--into FOLDER",
            code="EVO-CLI-005",
        )
    if existing is not None and Path(existing).resolve() != target.resolve():
        raise UserError(
            f"the command xtuner exists already: {existing}",
            fix="use evomesh xtuner ..., or uninstall that package first",
            code="EVO-CLI-005",
        )
    try:
        target.write_text(text)
        target.chmod(target.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    except OSError as error:
        raise not_written(target, error, fix="--into FOLDER") from None
    print(f"wrote {target}: xtuner is now evomesh xtuner")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry of the script that ``install-command`` writes."""
    from evomesh.cli.run import run

    if arguments is not None:
        sys.argv[1:] = arguments
    run(app, trains=sys.argv[1:2] == ["train"])
