"""Commands that start ranks and print a result: nothing else is on standard output."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.monitor.log import close_logging

CONFIG = """
model = dict(num_layers=1, hidden_size=16, num_attention_heads=1, vocab_size=8, dtype="torch.float32")
data = dict(seq_len=8, total_steps=2, valid_folder=".", valid_every=1)
"""


class Started(Exception):
    """Raised where this process would become torchrun."""


@pytest.mark.parametrize("command", ["validate", "doctor", "parity"])
def test_the_start_of_ranks_is_no_part_of_the_result(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.py"
    config.write_text(CONFIG)
    started = []

    def execve(program: str, arguments: list[str], env: dict[str, str]) -> None:
        started.append(arguments)
        raise Started

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    try:
        result = CliRunner().invoke(app, [command, str(config), "--json"])
    finally:
        close_logging()
    assert isinstance(result.exception, Started), result.output
    assert "--nproc_per_node=2" in started[0]
    assert result.stdout == ""
