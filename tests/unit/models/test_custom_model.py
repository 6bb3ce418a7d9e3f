"""The example of a user's own model: built, checked and trained by the registry's rules alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from evomesh.config.schema import Config, LossConfig, ModelConfig
from evomesh.errors import ConfigError, UserError
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.registry import ModelInitializer, build_model, initialize_weights
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import MODES
from evomesh.train.stages import build_stages

FOLDER = Path(__file__).parents[3] / "examples" / "custom_model"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The ``model`` section as the config file gives it, its model registered for this test only."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(
        "evomesh.models.registry.model_initializer", ModelInitializer({})
    )
    section: dict[str, Any] = dict(
        load("config").model, model_type="PARALLEL_BLOCKS", dtype="float32"
    )
    own = {"first_gain": section.pop("first_gain")}
    return {**section, "extra": own}


def test_its_own_parameter_arrives_and_it_learns(config: dict[str, Any]) -> None:
    model = build_model(ModelConfig(**config))
    initialize_weights(model, seed=1)
    assert set(model.get_parameter("layers.0.gain").tolist()) == {0.5}
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (65,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.loss(
            model(ids[:-1], single_sequence(64)), ids[1:], 1 / 64
        ).scaled_sum
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_misspelt_own_parameter_is_refused(config: dict[str, Any]) -> None:
    config["extra"] = {"first_gian": 0.5}
    with pytest.raises(
        ConfigError, match=r"model\.first_gian.*\n.*\n.*did you mean 'first_gain'"
    ):
        build_model(ModelConfig(**config))


def test_z_loss_is_refused_by_a_loss_that_would_leave_it_out(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Config(model=ModelConfig(**config), loss=LossConfig(z_loss_coeff=1e-4))
    cpu = torch.device("cpu")
    stages = build_stages(run, Grid(), MODES["mtp"], cpu)  # the example's loss has it

    def loss_without_z(
        self: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        grad_scale: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(stages.models[0]), "loss", loss_without_z)
    with pytest.raises(UserError, match="'PARALLEL_BLOCKS' takes no z_loss_coeff"):
        build_stages(run, Grid(), MODES["mtp"], cpu)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layer_range": range(2)}, "takes no layer_range"),
        ({"grid": Grid(tp=Axis("tp", 2))}, "takes no grid and no mode"),
    ],
)
def test_what_its_builder_knows_nothing_of_is_refused(
    given: dict[str, Any], words: str, config: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=words):
        build_model(ModelConfig(**config), **given)
