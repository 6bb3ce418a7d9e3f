"""Values of the model section that other tests only use: each changes what the model computes or is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.config.reading.draft import ConfigDraft
from evomesh.config.reading.spellings import resolve
from evomesh.config.schema import ModelConfig
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.registry import build_model, initialize_weights
from tests.support.covers import covers

BASE: dict[str, Any] = dict(
    model_type="INTERNLM2_PUBLIC",
    num_layers=2,
    hidden_size=32,
    vocab_size=50,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    mlp_ratio=1.5,
    multiple_of=8,
    dtype="torch.float64",
    max_position_embeddings=16,
    use_dynamic_ntk_rope=True,
)


def logits(values: dict[str, Any]) -> Tensor:
    draft = ConfigDraft({"model": {**BASE, **values}}, lambda key: "")
    resolve(draft)
    assert not draft.problems
    config = ModelConfig.model_validate(draft.sections["model"], strict=False)
    model = build_model(config)
    initialize_weights(model, seed=1)
    ids = torch.randint(50, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model.logits(model(ids, single_sequence(len(ids))))
    return found


@covers(
    "model.num_layers",
    "model.hidden_size",
    "model.vocab_size",
    "model.num_attention_heads",
    "model.num_kv_attention_heads",
    "model.mlp_ratio",
    "model.multiple_of",
    "model.norm_type",
    "model.layer_norm_epsilon",
    "model.apply_post_layer_norm",
    "model.use_swiglu",
    "model.no_bias",
    "model.qk_interleaved",
    "model.adapt_hf",
    "model.rope_base",
    "model.rope_scaling_factor",
    "model.max_position_embeddings",
    "model.use_scaled_init",
    "model.init_type",
)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 3),
        ("hidden_size", 64),
        ("vocab_size", 60),
        ("num_attention_heads", 8),
        ("num_kv_attention_heads", 4),
        ("mlp_ratio", 2.0),
        ("multiple_of", 64),
        ("norm_type", "layernorm"),
        ("layer_norm_epsilon", 1e-3),
        ("apply_post_layer_norm", True),
        ("use_swiglu", False),
        ("no_bias", False),
        ("qk_interleaved", True),
        ("adapt_hf", False),
        ("rope_base", 500.0),
        ("rope_scaling_factor", 2.0),
        ("max_position_embeddings", 32),
        ("use_scaled_init", False),
        ("init_type", "uniform"),
    ],
)
def test_a_value_reaches_the_model(key: str, value: Any) -> None:
    base = (
        dict(no_bias=True) if key != "adapt_hf" else dict(no_bias=True, adapt_hf=True)
    )
    before, after = logits(base), logits({**base, key: value})
    assert torch.equal(before, logits(base))
    if key == "no_bias":  # biases begin at zero: they show in the parameters
        assert any("bias" in name for name in parameters({**base, key: value}))
        assert not any("bias" in name for name in parameters(base))
        return
    assert before.shape != after.shape or not torch.equal(before, after)


@covers("model.use_sliding_window")
@pytest.mark.parametrize("used", [None, True, False])
def test_a_window_that_is_switched_off_asks_for_nothing(used: bool | None) -> None:
    values: dict[str, Any] = {**BASE, "model_type": "MISTRAL", "sliding_window": 8}
    draft = ConfigDraft(
        {"model": values if used is None else values | {"use_sliding_window": used}},
        lambda key: "",
    )
    resolve(draft)
    model = ModelConfig.model_validate(draft.sections["model"], strict=False)
    assert model.sliding_window == (None if used is False else 8)


@pytest.mark.parametrize(
    ("family", "switches"),
    [
        ("LLAMA2", (True, True, False)),
        ("INTERNLM3", (False, False, False)),
        ("PHI3", (False, False, False)),
        ("SMOLLM3", (False, False, False)),
        ("BAICHUAN2", (False, False, False)),
        ("QWEN2", (True, False, False)),
        ("QWEN3", (False, False, True)),
        ("MISTRAL", (False, False, False)),
        ("OLMO2", (False, False, True)),
    ],
)
def test_a_family_sets_its_switches(
    family: str, switches: tuple[bool, bool, bool]
) -> None:
    draft = ConfigDraft({"model": {**BASE, "model_type": family}}, lambda key: "")
    resolve(draft)
    model = ModelConfig.model_validate(draft.sections["model"], strict=False)
    assert (model.has_qkv_bias, model.has_o_bias, model.qk_norm) == switches


@covers("model.nope_layers")
@pytest.mark.parametrize(
    ("given", "layers"), [({}, (3, 7)), ({"nope_layers": [0]}, (0,))]
)
def test_every_fourth_layer_of_smollm3_does_not_rotate_unless_the_config_says_so(
    given: dict[str, Any], layers: tuple[int, ...]
) -> None:
    values = {**BASE, "model_type": "SMOLLM3", "num_layers": 9, **given}
    draft = ConfigDraft({"model": values}, lambda key: "")
    resolve(draft)
    assert draft.sections["model"]["nope_layers"] == layers


def parameters(values: dict[str, Any]) -> list[str]:
    config = ModelConfig.model_validate(
        {**BASE, **values, "dtype": "float64"}, strict=False
    )
    return [name for name, _ in build_model(config).named_parameters()]
