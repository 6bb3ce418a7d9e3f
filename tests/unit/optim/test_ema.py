"""The moving average of the weights against a loop, and what reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from evomesh.checkpoint.native.commit import commit_tensors
from evomesh.checkpoint.native.ema_weights import with_ema_weights
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.load import resolve
from evomesh.checkpoint.optimizer_state import ema_lines, has_stored_ema
from evomesh.checkpoint.restore import restore_model
from evomesh.checkpoint.start_point import EVERYTHING, StartPoint
from evomesh.cli.app import app
from evomesh.config.optimizer import EmaConfig, OptimizerConfig
from evomesh.config.record import config_to_dict
from evomesh.config.schema import AdamConfig, Config, ModelConfig, ZeroConfig
from evomesh.errors import UserError
from evomesh.optim.zero import ZeroOptimizer
from evomesh.serve.load import ModelOptions, load_service
from tests.support.covers import covers
from tests.support.serving import byte_tokenizer
from tests.support.tolerances import assert_close, assert_equal_bits
from tests.unit.checkpoint.native.test_average import MODEL, weights_of

WEIGHTS_ONLY = frozenset({"model"})


@covers("optimizer.ema.every")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_a_loop(dtype: torch.dtype, every: int) -> None:
    weight = nn.Parameter(torch.randn(6, 4).to(dtype))
    config = OptimizerConfig(ema=EmaConfig(decay=0.75, every=every))
    optimizer = ZeroOptimizer(
        [("w.weight", weight)], AdamConfig(), ZeroConfig(), config=config
    )
    state = optimizer.state_tensors()
    wide = state.get("optim.master.w.weight", weight.detach())
    average = wide.clone()
    for step in range(7):
        (weight * torch.randn(6, 4).to(dtype)).sum().backward()
        optimizer.step(0.1, 0.95, 1.0)
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            average = 0.75 * average + 0.25 * wide
    assert_close(state["optim.ema.w.weight"], average, 1e-6)
    assert optimizer.state()["ema_calls"] == 7
    before = weight.detach().clone(), wide.clone()
    with optimizer.averaged_weights():
        expected = state["optim.ema.w.weight"].to(dtype)
        assert_equal_bits(weight.detach(), expected)
        assert not torch.equal(expected, before[0])
    assert_equal_bits(weight.detach(), before[0])
    assert_equal_bits(wide, before[1])


def saved(
    root: Path, *, averaged: bool = True, model: ModelConfig = MODEL
) -> Checkpoint:
    tensors = weights_of(0, model)
    if averaged:
        for name, average in weights_of(1, model).items():
            tensors[f"optim.ema.{name}"] = average.float() * 1.001
    record = config_to_dict(Config(model=model))
    return resolve(commit_tensors(str(root), 5, tensors, {}, record))


def test_averages_are_read_as_the_weights(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    found = restore_model(str(tmp_path), ema=True)
    assert found.source == f"the averaged weights of step 5 of {tmp_path}"
    for name, average in weights_of(1).items():
        weight = found.model.get_parameter(name).detach()
        assert_equal_bits(weight, (average.float() * 1.001).bfloat16(), name)
    assert set(with_ema_weights(checkpoint).records()) == set(weights_of(0))
    plain = restore_model(str(tmp_path))
    for name, weight in weights_of(0).items():
        assert_equal_bits(plain.model.get_parameter(name).detach(), weight, name)
    assert plain.fingerprint != found.fingerprint


def test_averages_are_exported(tmp_path: Path) -> None:
    saved(tmp_path / "ckpts")
    out = str(tmp_path / "hf")
    arguments = ["convert", "to-hf", str(tmp_path / "ckpts"), out]
    options = ["--tokenizer", "none", "--ema"]
    result = CliRunner().invoke(app, arguments + options)
    assert result.exit_code == 0, result.output
    # With the averages in the data files.
    assert "largest logit difference between the native model" in result.output
    exported = load_file(tmp_path / "hf/model.safetensors")
    expected = weights_of(1)["layers.1.feed_forward.w1.weight"]
    found = exported["model.layers.1.mlp.gate_proj.weight"]
    assert_equal_bits(found, (expected.float() * 1.001).bfloat16())


def test_a_service_has_the_averages(tmp_path: Path) -> None:
    bytes_model = MODEL.model_copy(update={"vocab_size": 256})
    saved(tmp_path / "ckpts", model=bytes_model)
    byte_tokenizer(tmp_path / "tok")
    options = ModelOptions(tokenizer=str(tmp_path / "tok"), ema=True)
    service = load_service(str(tmp_path / "ckpts"), "cpu", options)
    assert service.model.fingerprint.endswith("-ema")
    served = service.engines.builders["origin"]().model
    for name, average in weights_of(1, bytes_model).items():
        weight = served.get_parameter(name).detach()
        assert_equal_bits(weight, (average.float() * 1.001).bfloat16(), name)


def test_a_checkpoint_without_averages_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, averaged=False)
    with pytest.raises(UserError, match="no average of the weights: it has weights"):
        restore_model(str(tmp_path), ema=True)


def test_what_a_start_says_about_the_average(tmp_path: Path) -> None:
    with_average = saved(tmp_path / "a")
    without = saved(tmp_path / "b", averaged=False)
    on, off = EmaConfig(decay=0.9), EmaConfig()
    begins = "begins with the loaded weights"
    for checkpoint, content, config, words in (
        (with_average, EVERYTHING, on, ""),
        (with_average, EVERYTHING, off, "ends here"),
        (with_average, WEIGHTS_ONLY, on, begins),
        (with_average, WEIGHTS_ONLY, off, ""),
        (without, EVERYTHING, on, begins),
        (without, EVERYTHING, off, ""),
    ):
        start = StartPoint("", checkpoint, content=content)
        lines = "".join(ema_lines(start, config))
        assert (words in lines) if words else not lines
        assert has_stored_ema(start) == (
            checkpoint is with_average and content == EVERYTHING
        )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["serve", "chat"])
def test_commands_that_serve_take_the_average(tmp_path: Path, command: str) -> None:
    saved(tmp_path, averaged=False)
    arguments = [command, "--ckpt", str(tmp_path), "--port", "0", "--ema"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError), result.output
    assert "no average of the weights" in str(result.exception)
