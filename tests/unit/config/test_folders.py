"""Two roles never share one folder, however its path is spelled."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.config.folders import shared_role
from evomesh.config.loader import load_config
from evomesh.errors import UserError


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("save", "snapshots"),
    [
        ("a", "a"),
        ("local:a", "a"),
        ("a", "local:./a/"),
        ("a", "LOCAL:b/../a//"),
        ("a", "link"),
        ("link/", "a"),
        ("a/b", "link/b"),
        ("new", "a/../new"),
        ("boto3:s3://b.h:9/k", "boto3:s3://b.h:9/k/"),
        ("boto3:s3://b.h:9/k/x", "boto3:s3://b.h:9//k//x"),
        ("s3:http://h:9/b/k", "boto3:s3://b.h:9/k"),
        ("s3://b/k", "s3://b/k/"),
        ("s3://b/k", "boto3:s3://b.h/k"),  # the environment may name this host
        ("boto3:s3://b.h", "boto3:s3://b.h/"),
    ],
)
def test_the_same_folder(disk: Path, save: str, snapshots: str) -> None:
    assert shared_role(save, snapshots) == "the same folder as save_ckpt_folder"


@pytest.mark.parametrize(
    ("save", "snapshots", "words"),
    [
        ("a/b", "a", "contains"),
        ("link/b", "a", "contains"),
        ("a", ".", "contains"),
        ("boto3:s3://b.h/k/x", "boto3:s3://b.h/k", "contains"),
        ("a", "a/step-00000005", "inside the folder of one checkpoint"),
        ("a", "link/step-00000005-0badc0de/x", "inside the folder of one checkpoint"),
    ],
)
def test_nested_folders(disk: Path, save: str, snapshots: str, words: str) -> None:
    assert words in shared_role(save, snapshots)


@pytest.mark.parametrize(
    ("save", "snapshots"),
    [
        ("a", "a/snapshot"),
        ("a", "a/b"),
        ("a", "ab"),
        ("a", "boto3:s3://a.h/a"),
        ("boto3:s3://b.h/k", "boto3:s3://b.other/k"),
        ("boto3:s3://b.h/k", "boto3:s3://c.h/k"),
        ("boto3:s3://b.h/k", "boto3:s3://b.h/k2"),
        ("step-00000005/a", "step-00000005/a/snapshot"),
    ],
)
def test_folders_that_do_not_meet(disk: Path, save: str, snapshots: str) -> None:
    assert shared_role(save, snapshots) == ""


def test_the_config_check_refuses_a_shared_folder(disk: Path) -> None:
    Path("c.py").write_text(
        'data = dict(train_folder="x")\nckpt = dict(save_ckpt_folder="local:a", snapshot_ckpt_folder="link/")\n'
    )
    with pytest.raises(
        UserError,
        match=r"ckpt.snapshot_ckpt_folder(.|\n)*the same folder(.|\n)*fix: remove",
    ):
        load_config("c.py")
