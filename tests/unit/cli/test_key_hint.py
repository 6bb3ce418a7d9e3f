"""An unknown option or word that looks like a config key: the message says how keys are set."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["train", "x.py", "--lr", "1e-3"], "--set adam.lr=VALUE"),
        (["train", "x.py", "--checkpoint-every", "9"], "--set ckpt.checkpoint_every="),
        (["train", "x.py", "--type", "y"], ""),  # of several keys
        (["train", "x.py", "--qqq", "1"], ""),
        (["ckpt", "ls", "x", "--lr", "1"], ""),  # takes no keys
    ],
)
def test_the_key_of_an_unknown_option_is_named(options: list[str], hint: str) -> None:
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    if hint:
        assert hint in result.output
    else:
        assert "a config key is set" not in result.output


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--set", "seed=1", "a.b=2", "c=3"], "--set a.b=2 --set c=3"),
        (["--set", "seed=1", "a.b=2", "y.py"], ""),
        (["y.py"], ""),
    ],
)
def test_settings_that_follow_one_set_are_named(words: list[str], hint: str) -> None:
    result = CliRunner().invoke(app, ["train", "x.py", *words])
    assert result.exit_code == 2
    assert ("fix: each setting has its own --set" in result.output) == bool(hint)
    assert hint in result.output


def test_parentheses_of_a_setting_are_kept() -> None:
    words = ["--set", "seed=1", "optimizer.ema=dict(decay=0.9)"]
    result = CliRunner().invoke(app, ["train", "x.py", *words])
    assert "--set 'optimizer.ema=dict(decay=0.9)'" in result.output
