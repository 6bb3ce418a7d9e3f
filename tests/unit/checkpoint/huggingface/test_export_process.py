"""The process that exports one checkpoint: what it writes, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from evomesh.checkpoint.huggingface import start_export
from evomesh.checkpoint.huggingface.background_exports import ExportPlan
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.export_job import ExportJob
from evomesh.checkpoint.huggingface.export_process import run_export
from evomesh.checkpoint.huggingface.exported_folder import (
    ExportMark,
    file_sizes,
    read_mark,
)
from evomesh.checkpoint.huggingface.start_export import ExportProcess
from evomesh.checkpoint.native.format import CommitRecord
from evomesh.checkpoint.native.listener import NoListener
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.config.record import config_to_dict
from evomesh.config.schema import Config
from evomesh.errors import UserError
from tests.support.covers import covers
from tests.support.moto_store import moto_store
from tests.unit.checkpoint.huggingface.hf_models import (
    export,
    model_config,
    random_model,
    save_model,
)


def job_of(root: Path, out: Path, dtype: str | None = None) -> ExportJob:
    _, found = save_model(root, model_config(dtype="float32"))
    out.parent.mkdir(exist_ok=True)
    return ExportJob(found.folder, found.step, found.attempt, str(out), "..", dtype)


@covers("ckpt.export_hf.dtype")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_folder_is_that_of_the_command(tmp_path: Path, dtype: str | None) -> None:
    job = job_of(tmp_path / "c", tmp_path / "hf" / "hf-00000007", dtype)
    result = run_export(job)
    assert result.error == "" and "largest logit difference" in "".join(result.lines)
    _, found = save_model(tmp_path / "same", model_config(dtype="float32"))
    by_hand = export(found, tmp_path / "by-hand", ExportOptions(dtype=dtype), print)
    out = Path(job.out)
    mine = load_file(out / "model.safetensors")
    theirs = load_file(by_hand / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((by_hand / "config.json").read_text())
    assert config["dtype"] == (dtype or "float32")
    assert read_mark(out) == ExportMark("..", 7, job.attempt, file_sizes(out))


@pytest.mark.slow
def test_a_checkpoint_in_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is local, and the checkpoint is read where it is."""
    monkeypatch.setenv("S3_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("S3_SECRET_ACCESS_KEY_ID", "s")
    config = Config(model=model_config(dtype="float32"))
    weights = dict(random_model(config.model).named_parameters())
    listener = Commits()
    (tmp_path / "hf").mkdir()
    with moto_store("bucket") as address:
        root = f"s3:http://{address}/bucket/ckpts"
        writer = CheckpointWriter(root, listener=listener)
        writer.save(7, weights, {"train": {}}, config_to_dict(config))
        job = ExportPlan(root, tmp_path / "hf").job(*listener.heard[0])
        result = run_export(job)
        writer.close()
    assert result.error == "" and job.checkpoint == f"{root}/step-00000007"
    exported = load_file(tmp_path / "hf" / "hf-00000007" / "model.safetensors")
    stored = weights["embedding.weight"].detach()
    assert torch.equal(exported["model.embed_tokens.weight"], stored)


class Commits(NoListener):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, CommitRecord]] = []

    def committed(self, folder: str, record: CommitRecord) -> None:
        self.heard.append((folder, record))


def test_a_checkpoint_that_was_replaced(tmp_path: Path) -> None:
    job = job_of(tmp_path / "c", tmp_path / "hf" / "x")
    other = ExportJob(job.checkpoint, 7, "0badf00d", job.out, "..")
    with pytest.raises(UserError, match="not 0badf00d: it was replaced"):
        run_export(other)
    assert not Path(job.out).exists()


def test_the_room_of_the_next_checkpoint_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    job = job_of(tmp_path / "c", tmp_path / "hf" / "x")
    size = sum(file.stat().st_size for file in Path(job.checkpoint).glob("*-r*"))
    free = 2 * size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))
    with pytest.raises(UserError, match="the next checkpoint needs"):
        run_export(job)
    free = 2 * size
    run_export(job)


def test_the_environment_has_no_accelerator_and_no_rank() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "8", "HOME": "/h", "PYTHONPATH": "/mine"}
    made = start_export._environment(env | {"CUDA_VISIBLE_DEVICES": "0"})
    assert made["CUDA_VISIBLE_DEVICES"] == "" and made["HOME"] == "/h"
    assert not made.keys() & {"RANK", "WORLD_SIZE"}
    package, *rest = made["PYTHONPATH"].split(os.pathsep)
    assert Path(package, "evomesh", "__init__.py").is_file() and rest == ["/mine"]
    assert int(made["OMP_NUM_THREADS"]) >= 1
    assert start_export._environment({"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"


@pytest.mark.slow
def test_a_process_exports_and_keeps_to_itself(tmp_path: Path) -> None:
    job = job_of(tmp_path / "c", tmp_path / "hf" / "hf-00000007")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    result = ExportProcess(job).wait()
    assert result.error == "" and Path(job.out, "config.json").is_file()
    assert torch.equal(torch.get_rng_state(), before)
    assert [path.name for path in Path(job.out).parent.iterdir()] == ["hf-00000007"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL, which the system"),
        ("raise SystemExit('so it is')", "ended with exit code 1: so it is"),
        ("print('half of')", "ended with exit code 0"),
    ],
)
def test_a_process_without_a_result(
    script: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        start_export, "worker_command", lambda _: [sys.executable, "-c", script]
    )
    result = ExportProcess(ExportJob("c", 7, "0", "o", "..")).wait()
    assert error in result.error


@pytest.mark.slow
def test_an_export_that_is_given_up_deletes_what_it_wrote(tmp_path: Path) -> None:
    job = job_of(tmp_path / "c", tmp_path / "hf" / "hf-00000007")
    process = ExportProcess(job)
    root = Path(job.out).parent
    deadline = time.monotonic() + 120
    while not list(root.glob(".hf-*.tmp/model.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.end()
    result = process.wait()
    assert result.error
    assert not Path(job.out).exists()
