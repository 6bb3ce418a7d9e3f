"""Rotary scalings through config.json, in the older and the newer spelling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomesh.checkpoint.huggingface.config import (
    SpecialTokenIds,
    build_config,
    read_config,
    rotary_scaling,
)
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.to_native import from_hf
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.record import config_from_dict
from evomesh.config.rope import RopeScaling
from evomesh.config.schema import ModelConfig
from tests.unit.checkpoint.huggingface.hf_models import (
    export,
    found_in,
    model_config,
    save_model,
)

QUIET = ExportOptions(tokenizer="none")
ORIGINAL = {"original_max_position_embeddings": 16}
SCALINGS: list[dict[str, Any]] = [
    {"type": "linear", "factor": 3.0},
    {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | ORIGINAL,
    {"type": "yarn", "factor": 4.0, "beta_fast": 2.0, "truncate": False} | ORIGINAL,
    {
        "type": "longrope",
        "short_factor": (1.0, 1.5, 2.0, 3.0),
        "long_factor": (2.0, 3.0, 4.0, 6.0),
    }
    | ORIGINAL,
]


def scaled(settings: dict[str, Any]) -> ModelConfig:
    return model_config(rope_scaling=RopeScaling.model_validate(settings))


@pytest.mark.parametrize("settings", SCALINGS, ids=lambda settings: settings["type"])
@pytest.mark.parametrize(
    "removed", [(), ("rope_scaling", "rope_theta"), ("rope_parameters",)]
)
def test_either_spelling_is_read(
    settings: dict[str, Any], removed: tuple[str, ...]
) -> None:
    model = scaled(settings)
    record = build_config(
        model, "llama", rotary_scaling(model, 32), SpecialTokenIds(None, ()), "float64"
    )
    for key in removed:
        del record[key]
    back = read_config(record, "config.json")
    assert back.rope_scaling == model.rope_scaling
    assert (back.rope_base, back.use_dynamic_ntk_rope) == (model.rope_base, False)
    assert "rotary" not in record


@pytest.mark.parametrize("settings", SCALINGS, ids=lambda settings: settings["type"])
def test_both_ways_with_the_logits_check(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    _, found = save_model(tmp_path / "c", scaled(settings))
    lines: list[str] = []
    folder = export(found, tmp_path / "hf", QUIET, lines.append)
    from_hf(str(folder), str(tmp_path / "back"), None, True, lines.append)
    compared = [line for line in lines if "the native model and transformers" in line]
    assert len(compared) == 2
    stored = config_from_dict(found_in(tmp_path / "back").config).model.rope_scaling
    assert stored == RopeScaling.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope_type": "spiral"}, "rotary scaling 'spiral' is not supported"),
        (
            {"rope_type": "llama3", "factor": 8.0},
            "low_freq_factor: type 'llama3' needs it",
        ),
        (
            {"rope_type": "linear", "factor": 2.0, "bend": 1},
            "settings that are not known: bend",
        ),
        ({"rope_type": "linear", "factor": "far"}, "factor is 'far'"),
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    settings: dict[str, Any], words: str
) -> None:
    model = model_config()
    record = build_config(
        model, "llama", rotary_scaling(model, 32), SpecialTokenIds(None, ()), "float64"
    )
    del record["rotary"]
    with pytest.raises(CheckpointError, match=words):
        read_config(
            record | {"rope_scaling": None, "rope_parameters": settings}, "config.json"
        )


def test_no_option_replaces_a_scaling(tmp_path: Path) -> None:
    _, found = save_model(tmp_path / "c", scaled(SCALINGS[0]))
    with pytest.raises(CheckpointError, match="rope_scaling of type 'linear'"):
        export(
            found,
            tmp_path / "hf",
            replace(QUIET, rotary_type="origin"),
            lambda line: None,
        )
