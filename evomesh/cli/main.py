"""The ``evomesh`` command: one file per verb, and one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from evomesh.cli import ckpt, config, data, generate, tokenize, train
from evomesh.errors import UserError

app = typer.Typer(
    name="evomesh",
    help="Train decoder language models, from one laptop CPU to a thousand GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("tokenize")(tokenize.tokenize)
app.command("generate")(generate.generate)
app.add_typer(config.app, name="config", help="Check, show, list and copy configs.")
app.add_typer(data.app, name="data", help="Look at, verify and repair tokenised datasets.")
app.add_typer(ckpt.app, name="ckpt", help="List, verify and compare checkpoints.")


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (also EVOMESH_DEBUG=1)."),
) -> None:
    if debug:
        os.environ["EVOMESH_DEBUG"] = "1"


def run(command: Callable[[], object]) -> None:
    """Calls ``command``; a ``UserError`` is printed without a traceback and ends the process with its exit code."""
    try:
        command()
    except UserError as error:
        if os.environ.get("EVOMESH_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    run(app)
