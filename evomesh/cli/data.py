"""``evomesh data``: look at, verify and repair tokenised datasets."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def data() -> None:
    """Look at, verify and repair tokenised datasets."""


@app.command()
def repair(path: Annotated[str, typer.Argument(help="A .bin, or a folder of them.")]) -> None:
    """Rebuild the meta of token files from their lines; a torn last line is dropped, the old file kept as .torn."""
    from evomesh.data.repair import repair_path

    for message in repair_path(path):
        print(message)
