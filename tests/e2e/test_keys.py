"""Keys whose effect shows in a whole run only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomesh.config.schema import Config, RunConfig
from evomesh.train.launch import launch
from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.runs import losses, tensor_hashes, write_run


@covers("enable_tb", "ckpt.save_optimizer", "ckpt.checkpoint_every")
def test_switches_of_a_run(tmp_path: Path, interpreter: Interpreter) -> None:
    write_run(tmp_path)
    options = (
        "data.total_steps=4",
        "enable_tb=False",
        "ckpt.save_optimizer=False",
        "ckpt.checkpoint_every=3",
    )
    sets = [word for option in options for word in ("--set", option)]
    finished = interpreter.run(["evomesh", "train", "config.py", *sets], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert set(losses(tmp_path)) == set(range(4))
    assert not list(tmp_path.rglob("events.out.tfevents*"))
    assert sorted(path.name for path in tmp_path.glob("ckpts/step-*")) == ["step-00000003", "step-00000004"]
    names = tensor_hashes(tmp_path / "ckpts/step-00000004")
    assert names and not any(name.startswith("optim.") for name in names)


@covers("cudnn_deterministic", "cudnn_benchmark")
@pytest.mark.parametrize("flag", [True, False])
def test_cudnn_flags_reach_torch(monkeypatch: pytest.MonkeyPatch, flag: bool) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", not flag)
    monkeypatch.setattr(cudnn, "benchmark", not flag)
    with launch(Config(run=RunConfig(cudnn_deterministic=flag, cudnn_benchmark=flag))):
        assert (cudnn.deterministic, cudnn.benchmark) == (flag, flag)
