"""A folder without input files: the message names the endings that its files have."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.data.records.source_files import find_source_files
from evomesh.errors import UserError


def test_endings_that_are_not_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.py", "below/b.py", "c.rst", "LICENSE", ".hidden.md"):
        (tmp_path / name).write_text("text\n")
    with pytest.raises(UserError) as caught:
        find_source_files([str(tmp_path)])
    assert "are not read: .py (2)" in str(caught.value)
    assert ".rst (1)" in str(caught.value) and "no ending (1)" in str(caught.value)
    assert ".md" not in str(caught.value) and ".jsonl" in caught.value.fix


def test_at_most_five_endings_are_shown(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"a.{number}").write_text("text\n")
    with pytest.raises(UserError, match=r"\.4 \(1\), \.\.\.") as caught:
        find_source_files([str(tmp_path)])
    assert ".5" not in str(caught.value)


def test_an_empty_folder_has_no_endings(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_source_files([str(tmp_path)])
    assert "endings" not in str(caught.value)
