"""Keys whose effect shows in a whole run only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evomesh.config.schema import Config, RunConfig
from evomesh.errors import UserError
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
    assert sorted(path.name for path in tmp_path.glob("ckpts/step-*")) == [
        "step-00000003",
        "step-00000004",
    ]
    names = tensor_hashes(tmp_path / "ckpts/step-00000004")
    assert names and not any(name.startswith("optim.") for name in names)


@pytest.fixture
def restored_determinism(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the deterministic mode sets in this process."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        # So that the variable is restored, too, where the code has set it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@covers("deterministic")
@pytest.mark.parametrize("flag", [True, False])
def test_deterministic_mode_reaches_torch_and_cublas(
    restored_determinism: None, flag: bool
) -> None:
    with launch(Config(run=RunConfig(deterministic=flag))):
        assert torch.are_deterministic_algorithms_enabled() == flag
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory != flag
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (
            ":4096:8" if flag else None
        )
        assert os.environ.get("TORCHINDUCTOR_DETERMINISTIC") == ("1" if flag else None)


def test_deterministic_mode_refuses_a_workspace_with_which_sums_do_not_repeat(
    restored_determinism: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":1024:2")
    config = Config(run=RunConfig(deterministic=True))
    with (
        pytest.raises(
            UserError, match=r"(?s)CUBLAS_WORKSPACE_CONFIG=:1024:2.*:4096:8 or :16:8"
        ),
        launch(config),
    ):
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with launch(config):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@covers("cudnn_deterministic", "cudnn_benchmark")
@pytest.mark.parametrize("flag", [True, False])
def test_cudnn_flags_reach_torch(monkeypatch: pytest.MonkeyPatch, flag: bool) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", not flag)
    monkeypatch.setattr(cudnn, "benchmark", not flag)
    with launch(Config(run=RunConfig(cudnn_deterministic=flag, cudnn_benchmark=flag))):
        assert (cudnn.deterministic, cudnn.benchmark) == (flag, flag)
