"""Keys of other systems that have no effect here (one warning), or that are refused."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from evomesh.config.reading.draft import ConfigDraft
from evomesh.config.schema import Config

# key -> (the value that describes what happens anyway and needs no warning; why any other has no effect)
ABSENT = object()
INERT: dict[str, tuple[Any, str]] = {
    "metric_dtype": ("fp32", "metrics are always accumulated in at least float32"),
    "batch_count": (0, "the step is counted by the training state"),
    "alert_address": (None, "use monitor.alert.feishu_alert_address"),
    "moe": (ABSENT, "there are no mixture-of-experts layers here"),
    "data.batch_size": (ABSENT, "it is data.micro_num"),
    "model.enable_qkv_fusion": (True, "query, key and value are always one matrix"),
    "model.mlp_layer_fusion": (
        False,
        "the two input matrices of the feed-forward network are always multiplied separately",
    ),
    "model.selective_checkpoint": (False, "model.checkpoint recomputes whole layers"),
    "loss.op_type": (
        "py_vocab_parallel",
        "there is one loss, fused with the output head",
    ),
    "loss.moe_loss_coeff": (ABSENT, "there are no mixture-of-experts layers here"),
    "ckpt.generate_meta_data": (ABSENT, "every checkpoint loads in any layout"),
    "parallel.expert": (ABSENT, "there are no mixture-of-experts layers here"),
    "parallel.expert_weight": (ABSENT, "there are no mixture-of-experts layers here"),
}
# key -> (values that are accepted because they ask for nothing, why any other is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.drop_rate": (
        (0, None),
        "dropout is not part of evomesh: train on more text, or use weight decay",
    ),
    "model.attn_drop_rate": (
        (0, None),
        "dropout is not part of evomesh: train on more text, or use weight decay",
    ),
    "model.is_reward": ((False, None), "reward models are not part of evomesh"),
    "model.deepnorm": ((False, None), "DeepNorm is not part of evomesh"),
    "model.moe_use_residual": (
        (False, None),
        "mixture-of-experts models are not part of evomesh",
    ),
    "model.num_experts": (
        (1, 0, None),
        "mixture-of-experts models are not part of evomesh",
    ),
    "parallel.gqa": ((False, None), "set model.num_kv_attention_heads instead"),
    "parallel.sequence_2D": (
        ({"enable": False}, False, None),
        "two-dimensional sequence parallelism is not part of evomesh",
    ),
    "ckpt.enable_internevo2hf_ckpt": (
        (False, None),
        "export a finished checkpoint instead",
    ),
}
# Inert keys that the resolved config keeps -> the value that needs no warning; the schema says why they have no effect.
INERT_FIELDS: dict[str, Any] = {
    "data.use_packed_dataset": True,
    "model.use_flash_attn": True,
    "model.parallel_output": True,
    "model.dropout_selective_checkpoint": True,
    "lr_scheduler.last_epoch": -1,
    "beta2_scheduler.cur_iter": -1,
}


def drop_inert(draft: ConfigDraft) -> None:
    """Warn of keys without effect and remove those that the resolved config does not keep."""
    for key, usual in INERT_FIELDS.items():
        section, name = _section_and_name(draft, key)
        if name in section and section[name] != usual:
            draft.warn(
                key, f"{section[name]!r} has no effect: {_reason_without_effect(key)}"
            )
    for key, (usual, why) in INERT.items():
        section, name = _section_and_name(draft, key)
        if name in section:
            value = section.pop(name)
            if value != usual:
                draft.warn(key, f"{value!r} has no effect: {why}")


def _reason_without_effect(key: str) -> str:
    section, _, name = key.partition(".")
    model = Config.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return (
        (model.model_fields[name].description or "")
        .removeprefix("Accepted for InternEvo; ")
        .rstrip(".")
    )


def refuse_foreign(draft: ConfigDraft) -> None:
    """Refuse features that are not part of evomesh, and remove values that ask for nothing."""
    model = draft.take_section("model")
    if model.get("model_type") == "INTERNLM_MoE":
        draft.problem(
            "model_type",
            "INTERNLM_MoE: mixture-of-experts models are not part of evomesh",
            expected="INTERNLM, INTERNLM2_PUBLIC, LLAMA2 or a custom model type",
            fix="use a dense model",
        )
        model.update(model_type="INTERNLM", extra={})
    for key, (accepted, why) in REFUSED.items():
        section, name = _section_and_name(draft, key)
        if name not in section:
            continue
        value = section.pop(name)
        if not any(value == usual for usual in accepted):
            draft.problem(key, f"{value!r} is refused: {why}", fix=f"remove {key}")


def _section_and_name(draft: ConfigDraft, key: str) -> tuple[dict[str, Any], str]:
    section, dot, name = key.rpartition(".")
    if not dot:
        return draft.values, key
    known = section in draft.values or section in draft.sections
    return (draft.take_section(section) if known else {}), name
