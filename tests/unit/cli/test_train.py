"""InternEvo's command line: what its train.py takes is taken here."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from evomesh.cli import train

UNUSED = [
    *("--host", "node-1", "--backend", "nccl", "--world_size", "8", "--rank", "3"),
    *("--local_rank", "3", "--enable_ali_topology", "--disable_volc_topology"),
]


@pytest.mark.parametrize(
    ("words", "code"), [(UNUSED, 0), (["--local-rank=3"], 0), (["--bakend", "x"], 2)]
)
def test_options_that_internevo_never_reads(
    monkeypatch: pytest.MonkeyPatch, words: list[str], code: int
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(train, "train", lambda *arguments: seen.extend(arguments))
    app = typer.Typer()
    app.command()(train.shim)
    result = CliRunner().invoke(app, ["--config", "c.py", "--seed", "5", *words])
    assert result.exit_code == code, result.output
    if code == 0:
        assert seen == ["c.py", None, "auto", 8888, 5, None, False, False, None, False]
