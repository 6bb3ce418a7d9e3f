"""What a changed key does to a run that resumes: each key of the schema is in one class."""

from __future__ import annotations

from typing import Any

import pytest

from evomesh.config.reading.draft import leaves
from evomesh.config.record import config_to_dict
from evomesh.config.resume_effects import FUNCTION, NOTHING, compare_configs, effect_of
from evomesh.config.rope import RopeScaling
from evomesh.config.schema import Config, GenerationConfig, ModelConfig

KEYS = [key for key, _ in leaves(Config(generation=GenerationConfig()).model_dump())]


def test_every_entry_of_the_tables_is_a_key() -> None:
    def is_key(entry: str) -> bool:
        return any(
            key == entry or (entry.endswith(".") and key.startswith(entry))
            for key in KEYS
        )

    assert [entry for entry in (*FUNCTION, *NOTHING) if not is_key(entry)] == []


def test_every_key_of_the_model_is_classified_on_purpose() -> None:
    """A new key of the model section must be put into a table, unless it is one of these."""
    numerics = {
        "dtype",
        "use_fp32_norm",
        "output_tf32",
        "residual_in_fp32",
        "embed_grad_scale",
    }
    dropout = {"drop_rate", "attn_drop_rate"}
    training = {
        key for key in KEYS if key.startswith("model.") and effect_of(key) == "training"
    }
    assert training == {f"model.{name}" for name in numerics | dropout}


@pytest.mark.parametrize(
    ("key", "effect"),
    [
        ("model.rope_base", "function"),
        ("model.qk_interleaved", "function"),
        ("model.layer_norm_epsilon", "function"),
        ("model.norm_type", "function"),
        ("model.model_type", "function"),
        ("model.extra.experts", "function"),
        ("adam.lr", "training"),
        ("data.micro_num", "training"),
        ("data.seed", "training"),
        ("loss.label_smoothing", "training"),
        ("hybrid_zero_optimizer.clip_grad_norm", "training"),
        ("lr_scheduler.total_steps", "training"),
        ("grad_scaler.hysteresis", "training"),
        ("adam.groups", "training"),
        ("model.mup.base_head_dim", "function"),
        ("parallel.tensor.size", "nothing"),
        ("ckpt.save_ckpt_folder", "nothing"),
        ("model.compile", "nothing"),
        ("model.attention_kernel", "nothing"),
        ("model.checkpoint", "nothing"),
        ("run.job_name", "nothing"),
        ("data.train_folder", "nothing"),  # its content is compared by the manifest
        ("monitor.alert.enable_feishu_alert", "nothing"),
        ("generation.top_k", "nothing"),
    ],
)
def test_effects(key: str, effect: str) -> None:
    assert effect_of(key) == effect


def changed(**sections: dict[str, Any]) -> tuple[list[str], list[str]]:
    config = Config()
    updates = {
        name: getattr(config, name).model_copy(update=values)
        for name, values in sections.items()
    }
    found = compare_configs(
        config_to_dict(config), config_to_dict(config.model_copy(update=updates))
    )
    return [item.key for item in found.function], [item.key for item in found.training]


def test_differences_are_sorted_into_classes() -> None:
    assert changed() == ([], [])
    assert changed(
        model={"rope_base": 5e5, "dtype": "bfloat16", "compile": True},
        adam={"lr": 1.0},
        run={"job_name": "other"},
        data={"micro_num": 4},
    ) == (["model.rope_base"], ["data.micro_num", "model.dtype", "adam.lr"])


def test_what_acts_through_dynamic_ntk_only_is_silent_without_it() -> None:
    assert changed(
        model={"max_position_embeddings": 4096, "rope_scaling_factor": 2.0}
    ) == ([], [])
    assert changed(
        model={"max_position_embeddings": 4096, "use_dynamic_ntk_rope": True}
    )[0] == [
        "model.max_position_embeddings",
        "model.use_dynamic_ntk_rope",
    ]


def test_a_rotary_scaling_is_one_value() -> None:
    linear = RopeScaling(type="linear", factor=2.0)
    assert changed(model={"rope_scaling": linear})[0] == ["model.rope_scaling"]
    before = Config(model=ModelConfig(rope_scaling=linear))
    for other in (None, RopeScaling(type="linear", factor=4.0)):
        found = compare_configs(
            config_to_dict(before),
            config_to_dict(Config(model=ModelConfig(rope_scaling=other))),
        )
        assert [item.key for item in found.function] == ["model.rope_scaling"]


def test_two_ways_to_write_the_same_number_of_heads() -> None:
    assert changed(
        model={"num_kv_attention_heads": Config().model.num_attention_heads}
    ) == ([], [])


def test_a_checkpoint_of_an_older_version_lacks_keys() -> None:
    stored = config_to_dict(Config())
    del stored["model"]["rope_base"], stored["loss"]
    assert not compare_configs(stored, config_to_dict(Config())).function
    present = config_to_dict(
        Config(model=Config().model.model_copy(update={"rope_base": 5e5}))
    )
    (difference,) = compare_configs(stored, present).function
    assert (
        str(difference)
        == "model.rope_base: 10000.0 in the checkpoint, 500000.0 in the config"
    )
    stored["model"]["of_a_newer_version"] = 1
    assert compare_configs(stored, config_to_dict(Config())).function == ()
