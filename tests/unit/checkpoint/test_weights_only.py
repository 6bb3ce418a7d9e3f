"""Which weights a path names to a command that reads weights only."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.weights_only import choose_weights
from evomesh.config.schema import Config


@pytest.mark.parametrize(
    ("path", "step"), [("runs", "runs/100"), ("runs/50", "runs/50")]
)
def test_a_folder_of_internevos_steps_is_its_newest(
    path: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("50", "100"):
        # A step that lacks its counters has weights all the same.
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model_tp0_pp0.pt").touch()
    start = choose_weights(Config(), path, CheckpointReader())
    assert (start.path, start.ckpt_type) == (step, "internevo")
    assert start.reason == f"the weights of {step}"


@pytest.mark.parametrize("name", ["model.pt", "__0_0.distcp"])
def test_a_kind_that_is_not_read_is_refused_by_what_it_is(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="which is not read") as refusal:
        choose_weights(Config(), str(tmp_path), CheckpointReader())
    assert "ckpt_type" not in str(refusal.value)
    assert "a Hugging Face model folder or" in str(refusal.value)
