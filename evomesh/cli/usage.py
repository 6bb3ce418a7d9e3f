"""``ExplainedGroup``: commands whose errors of usage have a code, as all errors have."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import typer
from typer.core import TyperGroup

from evomesh.error_codes.words import chosen_language, explain_line, headlines

CODE = "EVO-CLI-001"
# typer brings click along since 0.20 or imports it before: its base class is in either.
USAGE_ERROR: Any = typer.BadParameter.__base__


class ExplainedGroup(TyperGroup):
    """The outermost group: what it and the commands below it reject gets the code of an error of usage."""

    def make_context(self, *args: Any, **keywords: Any) -> Any:
        """Parse the options before the command."""
        with _explained():
            return super().make_context(*args, **keywords)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's own words and run it."""
        with _explained():
            return super().invoke(ctx)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except USAGE_ERROR as error:
        # Its class prints the help of a group that was called without a command.
        if type(error).__name__ != "NoArgsIsHelpError":
            error.show = partial(_show, error.show)
        raise


def _show(print_message: Callable[..., None], file: Any = None) -> None:
    print_message(file)
    language = chosen_language(encoding=sys.stderr.encoding)
    lines = [*headlines([CODE], language), explain_line([CODE])]
    typer.echo("\n".join(lines), file=file, err=True)
