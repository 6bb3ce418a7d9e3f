"""Files that ``evomesh plan`` cannot write are refused before anything is predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.errors import UserError

# The config is not there: it is read only after the options are right.
START = ["plan", "nix.py", "--gpus", "1", "--device", "H100"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--html", "."], "--html: . is a folder"),
        (["--html", "nodir/x.html"], "nodir is no folder"),
        (
            ["--search", "--write", "nodir/x.py"],
            "--write: nodir/x.py cannot be written",
        ),
        (["--html", "kept.py"], "another ending than .html: it would be lost"),
        (["--json", "--html", "x.html"], "--json prints the memory of a rank"),
        (["--json", "--search"], "without layouts and costs"),
        (["--json", "--price", "2"], "without layouts and costs"),
    ],
)
def test_refused(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept.py").touch()
    result = CliRunner().invoke(app, [*START, *options])
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)


def test_a_file_that_can_be_written_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.html").touch()
    result = CliRunner().invoke(app, [*START, "--html", "x.html"])
    assert "no such config file" in str(result.exception)
