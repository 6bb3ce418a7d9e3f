"""docs/faq.md has the messages that its commands print: each is typed, on the config that its page describes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.error_codes.words import printed
from evomesh.errors import UserError
from tests.support.pages import DOCS, Page
from tests.support.runs import CONFIG, write_run

FOLDER = "/home/me/llm"  # stands on the page for the current folder


def sections() -> list[tuple[str, str]]:
    """Return (lines added to the config, command with what it prints) of each message on the page."""
    found = []
    added = ""
    for block in Page(DOCS / "faq.md").blocks:
        if block.text.startswith("$ "):
            found.append((added, block.text))
            added = ""
        else:
            added = block.text
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faq")
    write_run(path)
    (path / "text.txt").write_text("hello world\n")
    return path


@pytest.mark.parametrize("added,typed", sections(), ids=lambda text: text[:40].strip())
def test_message(
    added: str, typed: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "config.py").write_text(CONFIG + added)
    command, message = typed.split("\n", 1)
    error = CliRunner().invoke(app, shlex.split(command)[2:]).exception
    assert isinstance(error, UserError)
    assert f"{printed(error, 'en')}\n".replace(str(folder), FOLDER) == message
    assert error.exit_code == 2


def test_every_section_has_a_message() -> None:
    page = Page(DOCS / "faq.md")
    assert page.heading_levels.count(2) == len(sections()) >= 25
