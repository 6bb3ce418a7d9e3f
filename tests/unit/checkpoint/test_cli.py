"""``evomesh ckpt`` on a local folder and on an object store."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.cli.ckpt import app
from evomesh.errors import UserError
from tests.unit.storage.test_storage import BUCKET, endpoint, keys  # noqa: F401


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "ckpts")
    return (
        f"s3:http://{request.getfixturevalue('endpoint')}/{BUCKET}/cli/{tmp_path.name}"
    )


def save(root: str, *steps: int, value: float = 0.0) -> CheckpointWriter:
    manager = CheckpointWriter(root)
    for step in steps:
        manager.save(
            step,
            {"w": torch.full((50, 40), step + value), "b": torch.ones(3)},
            {"n": step},
            {},
        )
    manager.close()
    return manager


def ckpt(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def steps(listing: str) -> list[int]:
    return [int(found) for found in re.findall(r"^ *(\d+) ", listing, re.M)]


def test_ls_lists_all_steps(root: str) -> None:
    manager = save(root, 1, 2, 3)
    manager.storage.delete(f"{manager.root}/step-00000002/commit.json")
    listing = ckpt("ls", root)
    assert steps(listing) == [3, 2, 1]
    assert listing.count("committed") == 2 and re.search(
        r"^ *2 +interrupted", listing, re.M
    )
    assert "step-00000003" in listing
    with pytest.raises(UserError, match="no checkpoint at"):
        ckpt("ls", f"{root}/7")


def test_verify_names_what_is_damaged(root: str) -> None:
    manager = save(root, 1, 2)
    assert ckpt("verify", root).count(": good, 2 tensors") == 2
    folder = f"{manager.root}/step-00000002"
    (data,) = (
        name for name in manager.storage.list(folder) if name.endswith(".safetensors")
    )
    content = bytearray(manager.storage.read(f"{folder}/{data}"))
    content[-1] ^= 1
    manager.storage.delete(f"{folder}/{data}")
    writer = manager.storage.create(f"{folder}/{data}")
    writer.write(bytes(content))
    writer.finish()
    assert "DAMAGED" not in ckpt("verify", "--quick", root)
    result = CliRunner().invoke(app, ["verify", root])
    assert (
        isinstance(result.exception, UserError)
        and "1 damaged" in result.exception.found
    )
    assert (
        f"{folder}: DAMAGED" in result.output
        and data in result.output
        and "good" in result.output
    )


def test_verify_of_interrupted_saves_alone_is_an_error(root: str) -> None:
    """A script that verifies before it copies must not take an unfinished save for a good one."""
    manager = save(root, 1)
    folder = f"{manager.root}/step-00000001"
    manager.storage.delete(f"{folder}/commit.json")
    result = CliRunner().invoke(app, ["verify", f"{root}/1"])
    assert isinstance(result.exception, UserError)
    assert "only interrupted saves" in result.exception.found


def test_prune_keeps_what_is_pinned_and_the_newest(root: str) -> None:
    save(root, 1, 2, 3, 4, 5, 6)
    assert "pinned" in ckpt("pin", f"{root}/1")
    assert "pinned" in ckpt("ls", f"{root}/1")
    prune = ("prune", root, "--keep-last", "2", "--keep-every", "3")
    said = ckpt(*prune, "--dry-run")
    assert said.count("would delete") == 2 and "4 checkpoints stay" in said
    assert steps(ckpt("ls", root)) == [6, 5, 4, 3, 2, 1]
    assert ckpt(*prune).count("deleted") == 2
    assert steps(ckpt("ls", root)) == [6, 5, 3, 1]
    assert "no longer pinned" in ckpt("pin", "--undo", f"{root}/1")
    ckpt(*prune)
    assert steps(ckpt("ls", root)) == [6, 5, 3]


def test_diff_names_the_tensors_that_differ(root: str) -> None:
    save(root, 1)
    save(f"{root}-same", 1)
    save(f"{root}-other", 1, value=0.5)
    assert "equal" in ckpt("diff", root, f"{root}-same")
    said = ckpt("diff", root, f"{root}-other", code=1)
    assert re.search(r"^w\b", said, re.M) and not re.search(r"^b\b", said, re.M)
