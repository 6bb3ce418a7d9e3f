"""The name of a command that a group does not have, and what the help says of groups."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.cli.command_names import MEANINGS

GROUPS = {
    name: group
    for name, group in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    if hasattr(group, "commands")
}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ckpt compare", "; here: evomesh ckpt diff\n"),
        ("ckpt DELETE", "; here: evomesh ckpt prune\n"),
        ("ckpt verfy", "Did you mean 'verify'?\n"),
        ("data stats", "; here: evomesh data inspect\n"),
        ("convert to_hf", "; here: evomesh convert to-hf\n"),
        ("convert export", "; here: evomesh convert to-hf\n"),
        ("config validate", "; here: evomesh config check\n"),
        ("config convert", "; here: evomesh config translate\n"),
        ("convert zzz", "'zzz'.\n"),
        # The command of another group.
        ("data tokenize", "; here: evomesh tokenize or "),
        ("prune", "; here: evomesh ckpt prune\n"),
        ("xtuner chat", "; here: evomesh chat, or evomesh generate --chat\n"),
    ],
)
def test_the_command_that_is_meant_is_named(typed: str, meant: str) -> None:
    result = CliRunner().invoke(app, [*typed.split(), "x"], prog_name="evomesh")
    assert result.exit_code == 2
    assert meant in result.stderr


@pytest.mark.parametrize("name", GROUPS)
def test_the_help_of_a_group_has_the_names_of_its_commands(name: str) -> None:
    group = GROUPS[name]
    said = re.findall(r"[a-z-]+", group.help.lower())
    synonyms = {word for words in MEANINGS for word in words}
    deeds = [word for word in said if word in synonyms and word not in ("list", name)]
    assert set(deeds) <= set(group.commands)
