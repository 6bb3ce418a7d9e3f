"""docs/commands.md, in both languages, is what its tool writes from the command line's own help."""

from __future__ import annotations

import pytest
import typer

from tests.support.pages import STAMP
from tools import reference


def test_page_is_up_to_date() -> None:
    english, chinese = reference.pages()
    page = reference.PAGE
    assert page.text == english, "run: python tools/reference.py"
    written = STAMP.sub("", page.translation.text)
    assert written == chinese, "run: python tools/reference.py"


def test_no_command_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command("one")(lambda: None)
    app.command("two")(lambda: None)
    monkeypatch.setattr(reference, "app", app)
    with pytest.raises(SystemExit, match=r"evomesh one.*evomesh train"):
        reference.pages()
