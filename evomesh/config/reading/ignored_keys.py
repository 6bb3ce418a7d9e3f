"""Keys of other systems that have no effect here (one warning), or that are refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel

from evomesh.config.model import ModelConfig, ModelFamily
from evomesh.config.reading.draft import ConfigDraft
from evomesh.config.schema import Config

# key -> (the value that describes what happens anyway and needs no warning; why any
# other has no effect).
ABSENT = object()
NO_EXPERTS = "there are no mixture-of-experts layers here"
TEXT_ONLY = "evomesh trains on text, and this describes images"
INERT: dict[str, tuple[Any, str]] = {
    "metric_dtype": ("fp32", "metrics are always accumulated in at least float32"),
    "batch_count": (0, "the step is counted by the training state"),
    "alert_address": (None, "use monitor.alert.feishu_alert_address"),
    "selective_checkpoint": (False, "model.checkpoint recomputes whole layers"),
    "selective_checkpoint_offload": (False, "activations stay on the device"),
    "use_apex_adam": (False, "there is one AdamW, fused where the device has kernels"),
    "pad_token_id": (ABSENT, "nothing is padded with a token: generation.pad_id"),
    "fsdp_wrap_cls": (ABSENT, "parallel.zero1.fsdp shards every block"),
    "int8_mode": (ABSENT, "it belongs to int8_training"),
    "moe": (ABSENT, NO_EXPERTS),
    "data.batch_size": (ABSENT, "it is data.micro_num"),
    "data.unit_schedule_size": (ABSENT, "it belongs to parallel.pipeline.use_zeropp"),
    "data.data_yaml": (ABSENT, "data.train_folder names the data"),
    "data.base_path": (ABSENT, "data.train_folder names the data"),
    "data.vocab_file": (ABSENT, TEXT_ONLY),
    "data.image_folder": (ABSENT, TEXT_ONLY),
    "data.image_size": (ABSENT, TEXT_ONLY),
    "data.patch_size": (ABSENT, TEXT_ONLY),
    "model.device": (ABSENT, "weights are created on the device that trains them"),
    "model.moe_type": (ABSENT, NO_EXPERTS),
    "model.top_k": (ABSENT, NO_EXPERTS),
    "model.num_shared_experts": (0, NO_EXPERTS),
    "model.moe_layer_kwargs": (ABSENT, NO_EXPERTS),
    "model.enable_qkv_fusion": (True, "query, key and value are always one matrix"),
    "model.mlp_layer_fusion": (
        False,
        "the two input matrices of the feed-forward network are always multiplied separately",
    ),
    "model.selective_checkpoint": (False, "model.checkpoint recomputes whole layers"),
    "adam.clip_grad": (ABSENT, "hybrid_zero_optimizer.clip_grad_norm clips"),
    "loss.op_type": (
        "py_vocab_parallel",
        "there is one loss, fused with the output head",
    ),
    "loss.moe_loss_coeff": (ABSENT, NO_EXPERTS),
    "ckpt.generate_meta_data": (ABSENT, "every checkpoint loads in any layout"),
    "ckpt.universal_ckpt": (ABSENT, "every checkpoint loads in any layout"),
    "parallel.expert": (ABSENT, NO_EXPERTS),
    "parallel.expert_weight": (ABSENT, NO_EXPERTS),
    "parallel.expert_zero1": (ABSENT, NO_EXPERTS),
}


@dataclass(frozen=True)
class Refusal:
    """Why a key is refused.

    Attributes:
        reason: what evomesh does not do.
        instead: what to take; "": remove the key.
        accepted: values that ask for nothing, besides None, False, 0 and an empty block.
    """

    reason: str
    instead: str = ""
    accepted: tuple[Any, ...] = ()


_EXPERTS = Refusal(
    "mixture-of-experts models are not part of evomesh", "take a dense model"
)
_ZERO_BUBBLE = Refusal(
    "InternEvo's experimental pipelines are not part of evomesh",
    'set parallel.pipeline.mode="ZBV" with model.num_chunks=2, or "1F1B"',
)
_IMAGES = Refusal(
    "multimodal models are not part of evomesh", "take the language model alone"
)
REFUSED: dict[str, Refusal] = {
    "hf": Refusal(
        "model code of other packages is not run",
        'set model.from_hf="FOLDER", a Hugging Face folder of a family that evomesh has',
    ),
    "int8_training": Refusal(
        "int8 training is not part of evomesh", 'set model.dtype="torch.bfloat16"'
    ),
    "fp8": Refusal(
        "fp8 training is not part of evomesh", 'set model.dtype="torch.bfloat16"'
    ),
    "cpu_offloading": Refusal(
        "activations are not moved to the host", "set model.checkpoint=1.0"
    ),
    "data.is_multimodal": _IMAGES,
    "model.vit_cfg": _IMAGES,
    "model.vision_proj_cfg": _IMAGES,
    "model.image_token_id": _IMAGES,
    "model.is_reward": Refusal("reward models are not part of evomesh"),
    "model.deepnorm": Refusal("DeepNorm is not part of evomesh"),
    "model.max_window_layers": Refusal(
        "model.layer_types says which layers have a window",
        "set model.layer_types, or model.use_sliding_window=False",
    ),
    "model.moe_use_residual": _EXPERTS,
    "model.num_experts": replace(_EXPERTS, accepted=(1,)),
    "loss.mtp_loss_coeff": Refusal(
        "multi-token prediction is not part of evomesh", "set loss.mtp_loss_coeff=0"
    ),
    "parallel.gqa": Refusal(
        "it is an experiment of InternEvo", "set model.num_kv_attention_heads instead"
    ),
    "parallel.fsdp": Refusal(
        "this block goes with InternEvo's Hugging Face models",
        "set parallel.zero1=dict(size=-1, fsdp=True), which shards weights too",
    ),
    "parallel.pipeline.zero_bubble": _ZERO_BUBBLE,
    "parallel.pipeline.use_zeropp": _ZERO_BUBBLE,
    "parallel.pipeline.decouple_grad": _ZERO_BUBBLE,
}
# Inert keys that the resolved config keeps -> the value that needs no warning; the schema says why they have no effect.
INERT_FIELDS: dict[str, Any] = {
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
        value = section.get(name, usual)
        if value != usual:
            reason = _reason_without_effect(key)
            draft.warn(key, f"{value!r} has no effect: {reason}")
    for key, (usual, why) in INERT.items():
        if _is_custom_parameter(draft, key):
            continue
        section, name = _section_and_name(draft, key)
        if name not in section:
            continue
        value = section.pop(name)
        if value != usual and key not in draft.off:
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
    for key, refusal in REFUSED.items():
        if _is_custom_parameter(draft, key):
            continue
        section, name = _section_and_name(draft, key)
        if name not in section:
            continue
        value = section.pop(name)
        asks_for_nothing = not value or value in refusal.accepted
        if not asks_for_nothing:
            draft.problem(
                key,
                f"{value!r} is refused: {refusal.reason}",
                fix=refusal.instead or f"remove {key}",
                code="EVO-CONFIG-009",
            )


def _is_custom_parameter(draft: ConfigDraft, key: str) -> bool:
    """Return whether a key of the model section belongs to a model that the user has registered."""
    section, _, name = key.partition(".")
    if section != "model" or name in ModelConfig.model_fields:
        return False
    written = draft.values.get("model_type")
    family = draft.sections.get("model", {}).get("model_type", written)
    return family is not None and family not in get_args(ModelFamily)


def _section_and_name(draft: ConfigDraft, key: str) -> tuple[dict[str, Any], str]:
    """Return the section that a key is in, or would be in, as a dict to edit, and the key's name there."""
    *sections, name = key.split(".")
    if not sections:
        return draft.values, name
    top, *below = sections
    is_written = top in draft.values or top in draft.sections
    if not is_written:
        return {}, name
    node: Any = draft.take_section(top)
    for part in below:
        node = node.get(part, {})
        if not isinstance(node, dict):
            return {}, name  # such as the int form of a parallel size
    return node, name
