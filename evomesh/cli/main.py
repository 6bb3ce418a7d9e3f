"""Entry points of the command line.

Both ask for signals to be watched before anything large is imported, so that a run that
is stopped during its start ends with the documented exit code too.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from evomesh.cli.run import run

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the ``evomesh`` command."""
    words = sys.argv[1:3]
    supervises = words[:1] == ["run"]
    trains = supervises or words[:1] == ["train"] or words == ["xtuner", "train"]
    run(_evomesh, trains=trains, is_rank=not supervises)


def shim_main() -> None:
    """Run InternEvo's command line: the repository's ``train.py``."""
    run(_train_py, trains=True)


def _evomesh() -> None:
    from evomesh.cli.app import app

    app()


def _train_py() -> None:
    train_py_app()()


def train_py_app() -> typer.Typer:
    """Build the command line of train.py, which has no verbs."""
    from evomesh.cli.train import shim
    from evomesh.cli.usage import single_command

    return single_command(shim)
