"""Flipped bits, cut and swapped files: all are found and named, and the checkpoint before is taken."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from evomesh.checkpoint.native.find import Candidate, SaveFolder
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.native.verify import verify
from evomesh.errors import UserError
from evomesh.parallel.spec import LocalShard, ShardSpec
from evomesh.storage.local import LocalStorage
from tests.unit.checkpoint.native.ranks import ThreadExchange, grids, run_ranks

CASES = 400


def save(root: Path, *steps: int) -> None:
    def one(exchange: ThreadExchange) -> None:
        grid = grids(tp=2)[exchange.rank]
        writer = CheckpointWriter(str(root), grid=grid, exchange=exchange)
        for step in steps:
            part = LocalShard(
                torch.full((20, 9), float(step)), ShardSpec((40, 9), (("tp", 0),))
            )
            writer.save(
                step,
                {"layers.0.w": part, "optim.exp_avg.layers.0.w": part},
                {"step": step},
                {},
            )

    run_ranks(2, one)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path, 1, 2)
    return tmp_path


def complaint(folder: Path) -> str:
    """Verify a damaged checkpoint and return the error."""
    with pytest.raises(UserError) as error:
        verify(Candidate(LocalStorage(), str(folder), 2, True), "data")
    return str(error.value)


def test_every_flip_and_cut_is_found_and_named(root: Path) -> None:
    folder = root / "step-00000002"
    files = sorted(folder.iterdir())
    assert [f.name[9:] or f.name for f in files if f.name != "commit.json"] == [
        "index.jsonl",
        "r00000.safetensors",
        "r00001.safetensors",
    ]
    draw = random.Random(1)
    named = 0
    for case in range(CASES):
        file = files[case % len(files)]
        data = file.read_bytes()
        at = draw.randrange(len(data))
        if case % 4 == 3:
            file.write_bytes(data[:at])
        elif case % 40 == 2:
            file.write_bytes(
                data[:at] + b"\0" * min(512, len(data) - at) + data[at + 512 :]
            )
        else:
            file.write_bytes(
                data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
            )
        if file.read_bytes() == data:
            continue  # zeros over zeros
        text = complaint(folder)
        assert file.name in text, (case, text)
        named += bool(
            re.search(
                r"layers\.0\.w: piece at \[\d+, 0\] in .* does not match its hash", text
            )
        )
        file.write_bytes(data)
    assert named > CASES // 6
    verify(Candidate(LocalStorage(), str(folder), 2, True), "data")


def test_the_checkpoint_before_a_damaged_one_is_used(root: Path) -> None:
    for file in sorted((root / "step-00000002").iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
        said: list[str] = []
        found = CheckpointReader(report=said.append).newest(SaveFolder.open(str(root)))
        assert found is not None and found.step == 1 and file.name in said[0]
        file.write_bytes(data)


def test_swapped_renamed_missing_and_extra_files(root: Path) -> None:
    new, old = root / "step-00000002", root / "step-00000001"
    first, second = sorted(new.glob("*.safetensors"))
    keep = first.read_bytes(), second.read_bytes()
    first.write_bytes(keep[1])
    second.write_bytes(keep[0])  # ranks swapped
    assert "does not match its hash" in complaint(new)
    second.write_bytes(keep[1])
    # From another step.
    first.write_bytes(next(iter(sorted(old.glob("*r00000*")))).read_bytes())
    assert "does not match its hash" in complaint(new)
    first.unlink()
    assert re.search(
        r"r00000.safetensors is missing \(written by rank 0 of layout dp=1 pp=1 tp=2 world=2",
        complaint(new),
    )
    first.write_bytes(keep[0])
    (new / "notes.txt").write_text("extra files do no harm")
    verify(Candidate(LocalStorage(), str(new), 2, True), "data")
    # A record that names files of another attempt.
    shutil.copy(old / "commit.json", new / "commit.json")
    assert "named after step 2, but commit.json is of step 1" in complaint(new)
