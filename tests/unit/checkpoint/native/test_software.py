"""A checkpoint says which code wrote it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import evomesh
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.native.software import software, source_revision


def git(folder: Path, *arguments: str) -> str:
    who = {
        f"GIT_{role}_{part}": "test"
        for role in ("AUTHOR", "COMMITTER")
        for part in ("NAME", "EMAIL")
    }
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | who
    ).stdout.strip()


def test_revision_and_dirty_flag_of_a_source_tree(tmp_path: Path) -> None:
    assert source_revision(tmp_path) == ("", False)
    git(tmp_path, "init", "-q")
    assert source_revision(tmp_path) == ("", False)
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert source_revision(tmp_path) == (head, False)
    (tmp_path / "notes").write_text("untracked\n")
    assert source_revision(tmp_path) == (head, False)
    (tmp_path / "code.py").write_text("2\n")
    assert source_revision(tmp_path) == (head, True)


def test_a_package_inside_another_projects_tree_has_no_revision(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "one")
    inside = tmp_path / "venv/site-packages"
    inside.mkdir(parents=True)
    assert source_revision(inside) == ("", False)


def test_without_git_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_revision(Path(evomesh.__file__).parents[1]) == ("", False)


def test_the_commit_record_holds_it(tmp_path: Path) -> None:
    CheckpointWriter(str(tmp_path / "ckpts")).save(1, {"w": torch.ones(3)}, {}, {})
    body = json.loads((tmp_path / "ckpts/step-00000001/commit.json").read_text())[
        "body"
    ]
    assert body["software"] == software()
    assert set(software()) == {"evomesh", "revision", "dirty", "torch", "python"}
