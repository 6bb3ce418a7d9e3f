"""Resolve InternEvo's spellings, old and new, to the form of ``schema.py``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, get_args

from evomesh.config.families import FAMILY_FACTS, architecture_of
from evomesh.config.reading.checkpoint import resolve_checkpoint
from evomesh.config.reading.draft import ConfigDraft, shown
from evomesh.config.reading.dtypes import dtype_name
from evomesh.config.reading.from_hf import (
    resolve_from_hf,
    take_checkpoint_folder,
    take_from_load_info,
)
from evomesh.config.reading.ignored_keys import drop_inert, refuse_foreign
from evomesh.config.reading.parallel import resolve_parallel
from evomesh.config.schema import Config, ModelConfig, ModelFamily
from evomesh.config.switches import find_off_keys

BUILT_IN = get_args(ModelFamily)

# Other names that InternEvo has, or had, for a model type.
RENAMED_MODELS = {"INTERNLM2": "INTERNLM2_PUBLIC", "LLAMA": "LLAMA2"}

# InternEvo's other values of data.type -> why they are refused, what to take.
FOREIGN_DATA = {
    "mm": ("evomesh trains on text, not on images", "tokenize the texts alone"),
    "lumina_pickle": (
        "evomesh trains on text, not on images",
        "tokenize the texts alone",
    ),
    "megatron": (
        "Megatron's .bin and .idx files are not read",
        "make token files of the texts: evomesh tokenize",
    ),
    "mocked": (
        "it is a mock of InternEvo's tests",
        "set data.train_folder=None for synthetic data",
    ),
}
# Top-level names of a config file -> where the resolved config keeps them.
TOP_LEVEL = {
    "JOB_NAME": "run.job_name",
    "seed": "run.seed",
    "deterministic": "run.deterministic",
    "cudnn_deterministic": "run.cudnn_deterministic",
    "cudnn_benchmark": "run.cudnn_benchmark",
    "enable_tb": "run.enable_tb",
    "tensorboard_folder": "run.tensorboard_folder",
    "resume_tb_folder": "run.resume_tb_folder",
    "run_dir": "run.run_dir",
    "max_consecutive_skips": "run.max_consecutive_skips",
    "model_type": "model.model_type",
    "use_fp32_norm": "model.use_fp32_norm",
    "output_tf32": "model.output_tf32",
}
SECTIONS = tuple(name for name in Config.model_fields if name != "run")
# Keys that exist in config files only: read here, absent from the resolved form.
SPELLINGS = {
    "tensorboard": "Settings of TensorBoard: dict(queue_max_length=...).",
    "monitor.tensorboard": "Settings of TensorBoard, as the top-level tensorboard.",
    "monitor.tensorboard.queue_max_length": "As tensorboard.queue_max_length.",
    "parallel.sequence_parallel": "With the int form of parallel.tensor: True is mode msp, False is mode mtp.",
    "parallel.pipeline.mode": "Older name of parallel.pipeline.schedule.",
    "hybrid_zero_optimizer.zero_overlap_communication": "Older name of overlap_sync_grad.",
    "ckpt.load_ckpt_folder": "Older name of ckpt.load_ckpt_info; a string means content all.",
    "ckpt.load_optimizer": "Older key: False takes the optimizer out of load_ckpt_info.content.",
    "ckpt.load_model_only_folder": "Older name of ckpt.load_ckpt_info with content model.",
    "parallel.sequence_2D": "Heads times ring of InternEvo: with context_size=1 or head_size=1 it is mode isp of "
    "parallel.tensor, any other is refused.",
    "data.packed_length": "Sets data.micro_bsz if that is absent; otherwise it must agree.",
    "model.adapt_hf": "The opposite of model.qk_interleaved.",
    "model.from_hf": "Hugging Face folder, or id of a model in the local hub cache, whose config.json gives the family "
    "and all sizes; a key with another value is refused.",
    "model.use_sliding_window": "False: there is no window, whatever model.sliding_window says.",
}
QUEUE = "tensorboard.queue_max_length"
TUPLES = (
    "ckpt.load_ckpt_info.content",
    "generation.eos_id",
    "generation.additional_eos_token_list",
    "adam.no_decay",
    "grad_profiling.layers",
    "model.layer_types",
    "model.nope_layers",
    "model.rope_scaling.short_factor",
    "model.rope_scaling.long_factor",
    "monitor.alert.channels",
    "monitor.trackers",
)


def resolve(draft: ConfigDraft) -> None:
    """Fill ``draft.sections`` from ``draft.values``; unknown keys stay in, for the validation to report."""
    draft.off = find_off_keys(draft.values)
    _resolve_model_type(draft)
    drop_inert(draft)
    for name in SECTIONS:
        if name in draft.values and (
            name != "generation" or draft.values[name] is not None
        ):
            draft.take_section(name)
    _resolve_top_level(draft)
    _resolve_tensorboard(draft)
    resolve_parallel(draft)
    _resolve_zero(draft)
    _resolve_data(draft)
    _resolve_model(draft)
    refuse_foreign(draft)
    resolve_checkpoint(draft)
    _resolve_tuples(draft)


def _resolve_model_type(draft: ConfigDraft) -> None:
    """Resolve other names of a model, and the types that take the model from a Hugging Face folder."""
    model = draft.take_section("model") if draft.values.get("model") else {}
    for section in (draft.values, model):
        name = section.get("model_type")
        if not isinstance(name, str):
            continue
        if name == "INTERNLM_MoE":
            draft.problem(
                "model_type",
                f"{name}: mixture-of-experts models are not part of evomesh",
                expected=f"{', '.join(BUILT_IN)} or a custom model type",
                fix="use a dense model",
                code="EVO-CONFIG-009",
            )
            section["model_type"] = "INTERNLM"
        elif name == "AUTO" or name.endswith("_HF"):
            del section["model_type"]
            take_checkpoint_folder(draft, draft.take_section("model"), name)
        else:
            section["model_type"] = RENAMED_MODELS.get(name, name)


def written_key(key: str) -> str:
    """Return a resolved key as a config file writes it: ``run.job_name`` -> ``JOB_NAME``."""
    written = {target: name for name, target in TOP_LEVEL.items()} | {
        "run.tensorboard_queue": QUEUE
    }
    return written.get(key, key.replace("model.extra.", "model."))


def _resolve_top_level(draft: ConfigDraft) -> None:
    """Move top-level names into their sections: JOB_NAME becomes run.job_name."""
    for name, target in TOP_LEVEL.items():
        section_name, _, key = target.partition(".")
        is_at_top = name in draft.values
        if is_at_top:
            section = draft.take_section(section_name)
            section[key] = draft.values.pop(name)
            draft.sources[target] = name
            continue
        # Some files have such a name inside the model section instead.
        if section_name == "model":
            model = draft.take_section("model")
            if name in model:
                draft.sources[target] = target
    _resolve_environment(draft)


def _resolve_environment(draft: ConfigDraft) -> None:
    """Take TensorBoard's folders from the environment where the config leaves them out, as InternEvo does."""
    run = draft.take_section("run")
    for key in ("tensorboard_folder", "resume_tb_folder"):
        value = os.environ.get(key)
        if value and not run.get(key):
            run[key] = value
            draft.sources[f"run.{key}"] = f"environment variable {key}"


def _resolve_tensorboard(draft: ConfigDraft) -> None:
    """Resolve ``tensorboard=dict(queue_max_length=)``, at the top or in ``monitor``, as InternEvo's guide shows it."""
    monitor = draft.sections.get("monitor", {})
    values = {
        "monitor.tensorboard": monitor.pop("tensorboard", None),
        "tensorboard": draft.values.pop("tensorboard", None),
    }
    for key, written in values.items():
        if written is None:
            continue
        if not isinstance(written, Mapping) or set(written) - {"queue_max_length"}:
            draft.problem(
                key,
                f"found {shown(written)}",
                expected="dict(queue_max_length=10)",
                code="EVO-CONFIG-002",
            )
        elif "queue_max_length" in written:
            draft.take_section("run")["tensorboard_queue"] = written["queue_max_length"]
            draft.sources["run.tensorboard_queue"] = f"{key}.queue_max_length"


def _resolve_zero(draft: ConfigDraft) -> None:
    zero = draft.take_section("hybrid_zero_optimizer")
    if "zero_overlap_communication" in zero:
        value = zero.pop("zero_overlap_communication")
        if "overlap_sync_grad" not in zero:
            zero["overlap_sync_grad"] = value
            draft.sources["hybrid_zero_optimizer.overlap_sync_grad"] = (
                "hybrid_zero_optimizer.zero_overlap_communication"
            )
        elif value != zero["overlap_sync_grad"]:
            draft.warn(
                "hybrid_zero_optimizer.zero_overlap_communication",
                "has no effect: overlap_sync_grad is its newer name",
            )


def _resolve_data(draft: ConfigDraft) -> None:
    data = draft.take_section("data")
    _resolve_data_type(draft, data)
    packed = data.pop("packed_length", None)
    if packed is None:
        return
    seq_len = data.get("seq_len", 2048)
    bsz = data.get("micro_bsz")
    # packed_length = seq_len * micro_bsz: of the three, the config keeps the last two.
    are_counts = (
        isinstance(packed, int)
        and isinstance(seq_len, int)
        and packed >= 1
        and seq_len >= 1
    )
    if not are_counts or packed % seq_len:
        draft.problem(
            "data.packed_length",
            f"found {packed!r}, which is not a multiple of seq_len={seq_len!r}",
            expected="seq_len * micro_bsz",
            fix="remove packed_length and set data.micro_bsz",
            code="EVO-CONFIG-008",
        )
    elif bsz is None:
        data["micro_bsz"] = packed // seq_len
        draft.sources["data.micro_bsz"] = "data.packed_length"
    elif packed != seq_len * bsz:
        draft.warn(
            "data.packed_length",
            f"{packed} has no effect: it is seq_len * micro_bsz = {seq_len * bsz}",
        )


def _resolve_data_type(draft: ConfigDraft, data: dict[str, Any]) -> None:
    """Take "streaming" from "hf", its older name, and refuse InternEvo's other types."""
    kind = data.get("type")
    if kind == "hf":
        data["type"] = "streaming"
        return
    # Anything that is not a text is reported by the validation.
    if isinstance(kind, str) and kind in FOREIGN_DATA:
        reason, instead = FOREIGN_DATA[kind]
        found = f"{kind!r} is refused: {reason}"
        del data["type"]
        draft.problem("data.type", found, fix=instead, code="EVO-CONFIG-009")


def _resolve_model(draft: ConfigDraft) -> None:
    model = draft.take_section("model")

    # 1. What other sources say: a Hugging Face folder fills what the section leaves
    #    out, so it is read before any default is taken.
    _resolve_rope_scaling(draft, model)
    resolve_from_hf(draft, model)
    take_from_load_info(draft, model)
    family = model.get("model_type", ModelConfig.model_fields["model_type"].default)

    # 2. Spellings of single values.
    if "checkpoint" in model and isinstance(model["checkpoint"], bool):
        model["checkpoint"] = float(model["checkpoint"])
    if model.get("dtype") is None:
        model.pop("dtype", None)
        draft.warn(
            "model.dtype",
            'is not set: float16 as documented; dtype="torch.bfloat16" needs no loss scale',
        )
    model["dtype"] = dtype_name(model.get("dtype", "float16"))

    # 3. What depends on the family.
    _resolve_rotary_order(draft, model, family)
    _resolve_family(draft, model, family)
    if model.pop("use_sliding_window", True) is False:
        model.pop("sliding_window", None)
        model.pop("layer_types", None)
    if family not in BUILT_IN:
        _move_custom_parameters(draft, model)


def _move_custom_parameters(draft: ConfigDraft, model: dict[str, Any]) -> None:
    """Move the keys that only a registered model knows into ``model.extra``."""
    extra = model.setdefault("extra", {})
    custom = [key for key in model if key not in ModelConfig.model_fields]
    for key in custom:
        extra[key] = model.pop(key)
        draft.sources[f"model.extra.{key}"] = f"model.{key}"


def _resolve_rotary_order(
    draft: ConfigDraft, model: dict[str, Any], family: Any
) -> None:
    """Take ``qk_interleaved`` from its opposite ``adapt_hf``, else from the family's default."""
    adapt = model.pop("adapt_hf", None)
    if adapt is not None and not isinstance(adapt, bool):
        draft.problem(
            "model.adapt_hf",
            f"found {shown(adapt)}",
            expected="True or False",
            code="EVO-CONFIG-002",
        )
    elif adapt is not None and model.get("qk_interleaved", not adapt) is adapt:
        draft.problem(
            "model.adapt_hf",
            f"adapt_hf={adapt} and qk_interleaved={adapt} contradict each other",
            expected="opposites: both name the order of the rotary columns",
            fix="remove model.adapt_hf",
            code="EVO-CONFIG-007",
        )
    elif adapt is not None and "qk_interleaved" not in model:
        model["qk_interleaved"] = not adapt
        draft.sources["model.qk_interleaved"] = "model.adapt_hf"
    if "qk_interleaved" not in model:
        model["qk_interleaved"] = (
            family in FAMILY_FACTS and "qk_interleaved" in FAMILY_FACTS[family].defaults
        )
        draft.families["model.qk_interleaved"] = str(family)


def _resolve_family(draft: ConfigDraft, model: dict[str, Any], family: Any) -> None:
    """Take the family's default of each key that the config leaves out."""
    defaults: dict[str, Any] = {}
    if isinstance(family, str):
        defaults = _family_defaults(family, model)
    for key, value in defaults.items():
        if key in model:
            continue
        model[key] = value
        draft.families[f"model.{key}"] = family

    # ``head_dim = None`` asks for the width divided by the heads, as an absent one does.
    asks_for_default = "head_dim" in model and model["head_dim"] is None
    if asks_for_default:
        del model["head_dim"]
    # InternEvo's word for the activation of the gate, which such a family fixes.
    family_has_gate = "gate_activation" in defaults
    if family_has_gate and model.get("use_swiglu") is False:
        del model["use_swiglu"]


def _family_defaults(family: str, model: dict[str, Any]) -> dict[str, Any]:
    """Return the family's default of each key that has one; which layers have no rotation depends on their number."""
    facts = FAMILY_FACTS.get(family)
    if facts is None:
        return {}
    defaults = facts.defaults | architecture_of(family)
    interval = facts.nope_interval
    if interval is None:
        return defaults
    # Every fourth layer of SmolLM3 has no rotation: 3, 7, 11 ...
    default_layers = ModelConfig.model_fields["num_layers"].default
    layers = model.get("num_layers", default_layers)
    if isinstance(layers, int):
        nope_layers = range(interval - 1, layers, interval)
        defaults["nope_layers"] = list(nope_layers)
    return defaults


def _resolve_rope_scaling(draft: ConfigDraft, model: dict[str, Any]) -> None:
    """Take dynamic NTK from ``rope_scaling`` of type dynamic, and no scaling from type default."""
    scaling = model.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return  # absent, or for the validation to report
    key = "model.rope_scaling"
    scaling = model["rope_scaling"] = dict(scaling)
    if "rope_type" in scaling and "type" not in scaling:
        scaling["type"] = scaling.pop("rope_type")
    if scaling.get("type") == "default":
        del model["rope_scaling"]
    if scaling.get("type") != "dynamic":
        return
    del model["rope_scaling"]
    unknown = sorted(set(scaling) - {"type", "factor"})
    if unknown:
        draft.problem(
            f"{key}.{unknown[0]}",
            "has no meaning for type 'dynamic'",
            expected="dict(type='dynamic', factor=...)",
            code="EVO-CONFIG-007",
        )
    resolved = {"use_dynamic_ntk_rope": True}
    resolved |= (
        {"rope_scaling_factor": scaling["factor"]} if "factor" in scaling else {}
    )
    for name, value in resolved.items():
        if model.setdefault(name, value) != value:
            draft.problem(
                f"model.{name}",
                f"{model[name]!r} contradicts rope_scaling",
                fix=f"remove model.{name}",
                code="EVO-CONFIG-007",
            )
        draft.sources.setdefault(f"model.{name}", key)


def _put_tuple(section: dict[str, Any], key: str) -> None:
    """Make a value a tuple in place; None is removed, and what cannot be a tuple is for the validation to report."""
    value = section[key]
    if value is None:
        del section[key]
    elif isinstance(value, list | set):
        section[key] = tuple(value)
    elif isinstance(value, bool):
        return
    elif isinstance(value, int | str):
        section[key] = (value,)


def _resolve_tuples(draft: ConfigDraft) -> None:
    """Accept one value or a list where the schema has a tuple."""
    for dotted in TUPLES:
        *path, key = dotted.split(".")
        section = _section_at(draft.sections, path)
        if key in section:
            _put_tuple(section, key)
    loss = draft.sections.get("loss", {})
    # In InternEvo None is the same as no smoothing.
    smoothing = loss.get("label_smoothing", 0.0)
    if smoothing is None:
        loss["label_smoothing"] = 0.0


def _section_at(sections: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """Return the dict at a path of keys; an empty one where there is none."""
    for name in path:
        below = sections.get(name)
        if not isinstance(below, dict):
            return {}
        sections = below
    return sections
