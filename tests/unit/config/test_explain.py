"""``evomesh config show CONFIG --explain KEY``: every key has one description, from the schema or the tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.config import app
from evomesh.config.explain import describe, in_chinese
from evomesh.config.loader import known_keys
from evomesh.errors import UserError

SEVEN_B = str(Path(__file__).parents[3] / "configs" / "7B_sft.py")


def explained(key: str, *more: str) -> str:
    result = CliRunner().invoke(
        app, ["show", SEVEN_B, "--explain", key, *more], catch_exceptions=False
    )
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("key", known_keys())
def test_every_key_is_described(key: str) -> None:
    assert describe(key).endswith(".")


def test_a_key_is_explained_with_its_origin() -> None:
    text = explained("data.seq_len", "--set", "data.seq_len=512")
    for words in (
        "Longest attention segment",
        "type         int",
        ">= 1",
        "2048",
        "512",
        "--set",
    ):
        assert words in text
    assert "Name of the run" in explained("JOB_NAME")
    assert "Older name" in explained("ckpt.load_ckpt_folder")
    assert "never materializes" in explained("model.parallel_output")


def test_a_key_is_explained_in_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMESH_LANG", "zh")
    assert "description  最长的注意力片段" in explained("data.seq_len")
    without_text = [
        key
        for key in known_keys()
        if key.startswith("data.") and in_chinese(describe(key)) == describe(key)
    ]
    assert without_text == []


def test_a_section_is_explained_with_its_keys() -> None:
    text = explained("parallel.zero1")
    assert "Sharding of optimizer state" in text
    assert "keys         size, fsdp" in text
    assert "all data-parallel ranks" in explained("parallel.zero1.size")


def test_a_wrong_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean data\.seq_len"):
        explained("data.seq_le")
