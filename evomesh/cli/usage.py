"""Command lines whose errors of usage have a code, as all errors have: of typer and of argparse."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from evomesh.cli.command_names import CommandGroup
from evomesh.error_codes.words import chosen_language, explain_line, headlines
from evomesh.errors import EXIT_USER_ERROR

CODE = "EVO-CLI-001"
# typer brings click along since 0.20 or imports it before: its base class is in either.
USAGE_ERROR: Any = typer.BadParameter.__base__


class ExplainedGroup(CommandGroup):
    """The outermost group: what it and the commands below it reject gets the code of an error of usage."""

    def make_context(self, *args: Any, **keywords: Any) -> Any:
        """Parse the options before the command."""
        with _explained():
            return super().make_context(*args, **keywords)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's own words and run it."""
        with _explained():
            return super().invoke(ctx)


class XTunerGroup(CommandGroup):
    """The group of XTuner's commands: those that have another name here are named."""

    ELSEWHERE = {  # noqa: RUF012  # never changed
        "chat": "evomesh chat, or evomesh generate --chat",
        "preprocess": "evomesh xtuner tokenize CONFIG",
        "mmbench": "evomesh eval",
        "eval_refcoco": "evomesh eval; image models are not part of evomesh",
        "help": "evomesh xtuner --help",
        "version": "evomesh --version",
    }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or say what does its work here."""
        instead = self.ELSEWHERE.get(args[0])
        if instead is not None:
            ctx.fail(f"No such command {args[0]!r}; here: {instead}")
        return super().resolve_command(ctx, args)


class ExplainedCommand(TyperCommand):
    """A command line without verbs."""

    def make_context(self, *args: Any, **keywords: Any) -> Any:
        """Parse the words."""
        with _explained():
            return super().make_context(*args, **keywords)


def single_command(function: Callable[..., None]) -> typer.Typer:
    """Build the command line of a script without verbs, such as ``train.py``."""
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )
    app.command(cls=ExplainedCommand)(function)
    return app


class ExplainedParser(argparse.ArgumentParser):
    """A parser of argparse, for the commands of other systems that allow what typer does not."""

    def error(self, message: str) -> NoReturn:
        """Print usage, error and code, and end the process with 2."""
        self.print_usage(sys.stderr)
        lines = [f"{self.prog}: error: {message}", *_explanation()]
        self.exit(EXIT_USER_ERROR, "\n".join(lines) + "\n")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except USAGE_ERROR as error:
        # Its class prints the help of a group that was called without a command.
        if type(error).__name__ != "NoArgsIsHelpError":
            error.show = partial(_show, error.show, _key_hint(error))
        raise


def _key_hint(error: Any) -> str:
    """Say how config keys are set, if what the command rejects looks like one; else ""."""
    if error.ctx is None:
        return ""
    takes_keys = any("--set" in each.opts for each in error.ctx.command.params)
    if not takes_keys:
        return ""
    option = getattr(error, "option_name", None)
    return _settings_hint(error.message) if option is None else _option_hint(option)


def _settings_hint(message: str) -> str:
    """Say that --set takes one setting, where others follow it as they do XTuner's --cfg-options."""
    # The words that no parameter takes are in parentheses at the end; they may have some themselves.
    _, _, extra = message.partition(" (")
    words = extra.removesuffix(")").split()
    if not words or not all("=" in word for word in words):
        return ""
    settings = " ".join(f"--set {shlex.quote(word)}" for word in words)
    return f"  fix: each setting has its own --set: {settings}"


def _option_hint(option: str) -> str:
    """Name the config key that has the name of the unknown option, if there is a single one."""
    from evomesh.config.loader import known_keys

    name = option.lstrip("-").replace("-", "_")
    ending = f".{name}"
    keys = [key for key in known_keys() if key.endswith(ending)]
    if len(keys) != 1:
        return ""
    return f"  fix: a config key is set with --set {keys[0]}=VALUE"


def _show(
    print_message: Callable[..., None],
    hint: str,
    file: Any = None,
) -> None:
    print_message(file)
    if hint:
        typer.echo(hint, file=file, err=True)
    typer.echo("\n".join(_explanation()), file=file, err=True)


def _explanation() -> list[str]:
    """Return what is printed below an error of usage, in the user's language."""
    language = chosen_language(encoding=sys.stderr.encoding)
    return [*headlines([CODE], language), explain_line([CODE])]
