"""Entry points of the command line.

Both ask for signals to be watched before anything large is imported, so that a run that
is stopped during its start ends with the documented exit code too.
"""

from __future__ import annotations

import sys

from evomesh.cli.run import run


def main() -> None:
    """Run the ``evomesh`` command."""
    words = sys.argv[1:3]
    run(_evomesh, trains=words[:1] == ["train"] or words == ["xtuner", "train"])


def shim_main() -> None:
    """Run InternEvo's command line: the repository's ``train.py``."""
    run(_train_py, trains=True)


def _evomesh() -> None:
    from evomesh.cli.app import app

    app()


def _train_py() -> None:
    import typer

    from evomesh.cli.train import shim

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(shim)
    app()
