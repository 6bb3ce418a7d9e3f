"""What the generation section says about a checkpoint of another model section."""

from __future__ import annotations

import json
from typing import Any

import pytest

from evomesh.config.record import config_to_dict
from evomesh.config.rope import RopeScaling
from evomesh.config.schema import Config, ModelConfig
from evomesh.train.generation import other_settings

MODEL = ModelConfig(
    model_type="SMOLLM3",
    num_layers=2,
    nope_layers=(1,),
    sliding_window=8,
    layer_types=("full_attention", "sliding_attention"),
    rope_scaling=RopeScaling(type="linear", factor=2.0),
)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, []),
        ({"nope_layers": (0,)}, ["nope_layers"]),
        ({"sliding_window": 9, "layer_types": None}, ["sliding_window", "layer_types"]),
        ({"rope_scaling": None, "qk_interleaved": True}, ["qk_interleaved", "rope_scaling"]),
    ],
)  # fmt: skip
def test_settings_that_no_shape_shows_are_compared_with_the_checkpoint(
    changes: dict[str, Any], keys: list[str]
) -> None:
    stored = json.loads(json.dumps(config_to_dict(Config(model=MODEL))["model"]))
    config = Config(model=MODEL.model_copy(update=changes))
    lines = other_settings(config, stored)
    assert [line.split()[0] for line in lines] == [f"model.{key}" for key in keys]
