"""Tell what a changed config key does to a run that resumes from a checkpoint.

Each key of the schema is in one of three classes; a key that is in none of the tables
here changes the training.

    another function    the same weights compute something else, without any error: refused unless asked for
    another training    the model stays, its further updates differ: logged with both values
    nothing             layout, speed, paths, logs, initial values: silent
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomesh.config.reading.draft import leaves
from evomesh.config.record import config_from_dict, config_to_dict
from evomesh.errors import UserError

FUNCTION = (
    "model.model_type",
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
    "model.rope_base",
    "model.rope_scaling_factor",
    "model.max_position_embeddings",
    "model.use_dynamic_ntk_rope",
    "model.rope_scaling",
    "model.head_dim",
    "model.qkv_bias",
    "model.o_bias",
    "model.mlp_bias",
    "model.qk_norm",
    "model.qk_norm_over",
    "model.norm_placement",
    "model.add_unit_offset",
    "model.scale_embeddings",
    "model.gate_activation",
    "model.query_pre_attn_scalar",
    "model.attn_logit_softcapping",
    "model.final_logit_softcapping",
    "model.local_rope_base",
    "model.sliding_window",
    "model.layer_types",
    "model.nope_layers",
    "model.norm_head",
    "model.tie_word_embeddings",
    "model.mup.base_hidden_size",
    "model.mup.base_head_dim",
    "model.extra",
)
# They act through dynamic NTK and longrope only.
NTK = ("model.rope_scaling_factor", "model.max_position_embeddings")
# Whole sections end with a dot.
NOTHING = (
    "run.",
    "parallel.",
    "ckpt.",
    "monitor.",
    "grad_profiling.",
    "generation.",
    "data.train_folder",
    "data.valid_folder",
    "data.valid_micro_num",
    "data.valid_every",
    "data.valid_at_start",
    "data.valid_at_end",
    "data.stop_when",
    "data.sample_every",
    "data.samples",
    "data.eval_every",
    "data.evaluation",
    "data.valid_min_length",
    "data.valid_split_name",
    "data.num_worker",
    "data.gradient_accumulation",
    "data.empty_cache_and_diag_interval",
    "data.diag_outlier_ratio",
    "data.use_shm",
    "data.shm_path",
    "data.tokenizer_path",
    "data.chat_template",
    "data.allow_tokenizer_mismatch",
    "model.checkpoint",
    "model.embed_split_hidden",
    "model.parallel_output",
    "model.use_scaled_init",
    "model.init_type",
    "model.embedding_init_std",
    "model.attn_wqkv_init_std",
    "model.attn_other_init_std",
    "model.ffn_uplayer_init_std",
    "model.ffn_other_init_std",
    "model.out_head_init_std",
    "model.dropout_selective_checkpoint",
    "model.num_chunks",
    "model.use_flash_attn",
    "model.attention_kernel",
    "model.compile",
    "hybrid_zero_optimizer.overlap_sync_grad",
    "hybrid_zero_optimizer.overlap_sync_param",
    "hybrid_zero_optimizer.reduce_bucket_size",
    "hybrid_zero_optimizer.use_split_tensor_optim",
    "hybrid_zero_optimizer.all_gather_size",
    "grad_scaler.fp16.initial_scale",
    "lr_scheduler.last_epoch",
    "beta2_scheduler.cur_iter",
)


@dataclass(frozen=True)
class ConfigDifference:
    """A key with the value that a checkpoint was written with and the present one."""

    key: str
    stored: Any
    present: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.stored!r} in the checkpoint, {self.present!r} in the config"


@dataclass(frozen=True)
class ConfigDifferences:
    """The differences that matter, by what they do."""

    function: tuple[ConfigDifference, ...]
    training: tuple[ConfigDifference, ...]


def compare_configs(
    stored: Mapping[str, Any], present: Mapping[str, Any]
) -> ConfigDifferences:
    """Compare the config of a checkpoint with that of a run, key by key.

    Args:
        stored, present: as ``config_to_dict`` returns them. A key that a checkpoint of an older version does not have
            counts as the default.
    """
    completed = _completed(dict(stored))
    before = _comparable(completed)
    now = _comparable(dict(present))
    uses_length = _uses_trained_length(before) or _uses_trained_length(now)
    by_effect: dict[str, list[ConfigDifference]] = defaultdict(list)
    for key, value in now.items():
        # A key that only this version has is not a difference.
        if key not in before or before[key] == value:
            continue
        difference = ConfigDifference(key, before[key], value)
        effect = effect_of(key, uses_length)
        by_effect[effect].append(difference)
    return ConfigDifferences(
        function=tuple(by_effect["function"]),
        training=tuple(by_effect["training"]),
    )


def compare_model_sections(
    stored: Mapping[str, Any], present: Mapping[str, Any]
) -> tuple[ConfigDifference, ...]:
    """Compare an InternEvo checkpoint's model settings with a run's; those it does not record are not compared."""
    before = _comparable({"model": dict(stored)})
    now = _comparable({"model": dict(present)})
    uses_length = _uses_trained_length(now)
    differences = []
    for key, value in now.items():
        stored_value = before.get(key)
        is_recorded = stored_value is not None
        if not is_recorded or effect_of(key, uses_length) != "function":
            continue
        if stored_value != value:
            differences.append(ConfigDifference(key, stored_value, value))
    return tuple(differences)


def _uses_trained_length(values: Mapping[str, Any]) -> bool:
    """Return whether the rotary angles depend on the trained length: with dynamic NTK, and longrope."""
    scaling = values.get("model.rope_scaling") or {}
    return (
        bool(values.get("model.use_dynamic_ntk_rope"))
        or scaling.get("type") == "longrope"
    )


def effect_of(key: str, uses_trained_length: bool = True) -> str:
    """Return "function", "training" or "nothing"."""
    if any(_covers(name, key) for name in NTK) and not uses_trained_length:
        return "nothing"
    if any(_covers(name, key) for name in FUNCTION):
        return "function"
    return "nothing" if any(_covers(name, key) for name in NOTHING) else "training"


def _covers(name: str, key: str) -> bool:
    """Return whether a table entry means a key: itself, or one below it."""
    return key == name or key.startswith(name if name.endswith(".") else f"{name}.")


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of a config, values that mean the same made equal."""
    values = {
        key: value
        for key, value in leaves(config)
        if not key.startswith("model.rope_scaling.")
    }
    # A scaling or None, as one value.
    values["model.rope_scaling"] = config.get("model", {}).get("rope_scaling")
    if values.get("model.num_kv_attention_heads") is None:
        values["model.num_kv_attention_heads"] = values.get("model.num_attention_heads")
    return values


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config with the defaults of keys that it lacks; one of another version as it is."""
    try:
        return config_to_dict(config_from_dict(stored))
    except UserError:
        return stored
