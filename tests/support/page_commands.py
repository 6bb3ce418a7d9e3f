"""The commands that pages tell a reader to type, and whether the command line takes them."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import typer

from evomesh.cli.app import app
from evomesh.cli.main import train_py_app
from tests.support.pages import BLOCK, DOCS, Page

INDENTED = re.compile(r"(?:^    .*\n)+", re.M)
SPAN = re.compile(r"(?<!`)`([^`\s][^`\n]*)`(?!`)")
ASSIGNMENT = re.compile(r"[A-Z_][A-Z_0-9]*=")
# A line of a block without a language is a command if it begins with one of these.
PROGRAMS = {
    "evomesh", "python", "torchrun", "srun", "sbatch", "make", "pip", "docker", "git", "NPROC_PER_NODE=2",
    ".venv/bin/evomesh",
}  # fmt: skip
OPTIONAL = re.compile(r"\[(--?[^\]]*)\]")
CHOICE = re.compile(r"(?<=[\w-])\|[\w|-]+")


SHELL_SYNTAX = {"&&", "|", "&", ";", ">", ">>", "2>&1"}


@dataclass(frozen=True)
class PageCommand:
    """One command.

    Attributes:
        text: as on the page, on one line.
        is_mention: it stands in a sentence, where what it needs may be left out.
    """

    page: str
    text: str
    is_mention: bool

    @property
    def words(self) -> list[str]:
        """The words of the command with all optional parts, of choices the first."""
        text = CHOICE.sub("", OPTIONAL.sub(r"\1", self.text))
        words = shlex.split(text, comments=True)
        return list(itertools.takewhile(lambda word: word not in SHELL_SYNTAX, words))


def pages_with_commands() -> list[Page]:
    """Return the English pages and README: the Chinese ones have the same commands."""
    paths = sorted(DOCS.rglob("*.md"))
    english = [path for path in paths if not path.name.endswith(".zh.md")]
    return [Page(path) for path in [DOCS.parent / "README.md", *english]]


def commands_of(page: Page) -> Iterator[PageCommand]:
    """Yield the commands of a page's blocks, of its indented lines, and those that sentences mention."""
    name = page.path.relative_to(DOCS.parent).as_posix()
    for block in page.blocks:
        if block.language in ("", "sh", "text"):
            for line in typed_lines(block.text, is_shell=block.language == "sh"):
                yield PageCommand(name, line, is_mention=False)
    prose = BLOCK.sub("", page.text)
    for lines in INDENTED.findall(prose):
        for line in typed_lines(lines, is_shell=False):
            yield PageCommand(name, line, is_mention=False)
    for span in SPAN.findall(prose):
        program = span.split()[0]
        if program in PROGRAMS or ASSIGNMENT.match(program):
            yield PageCommand(name, span, is_mention=True)


def typed_lines(text: str, *, is_shell: bool) -> list[str]:
    """Return the lines of a block that are typed: all of a shell's, those after ``$``, or those of known programs."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()]
    if any(line.startswith("$ ") for line in lines):
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    is_command = (
        bool(lines) and lines[0].split()[:1] and lines[0].split()[0] in PROGRAMS
    )
    return [line for line in lines if line] if is_shell or is_command else []


# typer brings click along since 0.20 or imports it before; its classes are those of typer's own.
CLICK: Any = sys.modules[typer.BadParameter.__module__]


@cache
def _entry_points() -> dict[str, Any]:
    evomesh: Any = typer.main.get_command(app)
    return {
        "evomesh": evomesh,
        "train.py": typer.main.get_command(train_py_app()),
        "generate.py": evomesh.commands["generate"],
    }


def refusal(command: PageCommand) -> str:
    """Return why the command line refuses a command, "" if it takes it or the command is another program's."""
    words = command.words
    for number, word in enumerate(words):
        entry = _entry_points().get(word.removeprefix(".venv/bin/"))
        if entry is not None:
            arguments = [word for word in words[number + 1 :] if word != "..."]
            return _refusal_by(entry, arguments, command.is_mention)
    return ""


def _refusal_by(entry: Any, arguments: list[str], is_mention: bool) -> str:
    """Parse what follows ``entry``, a click command or group, without running it."""
    context = None
    try:
        while hasattr(entry, "commands"):
            context = entry.make_context(entry.name, arguments, parent=context)
            rest = [*context._protected_args, *context.args]
            if is_mention and (not rest or rest[0].isupper()):
                return ""
            _, entry, arguments = entry.resolve_command(context, rest)
        if is_mention:
            # Options alone: N stands for a number there, and files are left out.
            context = entry.context_class(entry, parent=context)
            entry.make_parser(context).parse_args(arguments)
        else:
            entry.make_context(entry.name, arguments, parent=context)
    except CLICK.MissingParameter as error:
        return "" if is_mention else str(error.format_message())
    except CLICK.UsageError as error:
        is_group_alone = type(error).__name__ == "NoArgsIsHelpError"
        return "" if is_mention and is_group_alone else str(error.format_message())
    except typer.Exit:
        return ""  # such as --version
    return ""
