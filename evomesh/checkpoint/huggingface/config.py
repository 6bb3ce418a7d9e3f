"""Convert between ``config.json`` with ``generation_config.json`` and our config sections.

Newer readers look at ``dtype`` and ``rope_parameters``, older ones at ``torch_dtype``, ``rope_theta`` and
``rope_scaling``: both spellings are written. ``config/hugging_face.py`` reads either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.families import FAMILY_FACTS
from evomesh.config.hugging_face import BAICHUAN_1_VOCAB, read_model
from evomesh.config.hugging_face_facts import HUGGING_FACE_FACTS, Switch
from evomesh.config.model import differing_key
from evomesh.config.schema import ModelConfig, RotaryType
from evomesh.errors import UserError

Architecture = Literal[
    "llama",
    "internlm2",
    "internlm3",
    "qwen2",
    "qwen3",
    "mistral",
    "olmo2",
    "phi3",
    "smollm3",
    "baichuan",
    "gemma",
    "gemma2",
    "gemma3_text",
]
CLASSES: dict[Architecture, str] = {
    "llama": "LlamaForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "baichuan": "BaichuanForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
BAICHUAN_ROPE_BASE = 10000.0  # its readers know no other
OWN_ARCHITECTURE: dict[str, Architecture] = {
    "QWEN2": "qwen2",
    "QWEN3": "qwen3",
    "MISTRAL": "mistral",
    "OLMO2": "olmo2",
    "PHI3": "phi3",
    "SMOLLM3": "smollm3",
    "GEMMA": "gemma",
    "GEMMA2": "gemma2",
    "GEMMA3": "gemma3_text",
}


def default_architecture(model: ModelConfig) -> Architecture:
    """Return the architecture that a model is exported as: its own where transformers has it, else Llama's.

    InternLM3 with biases that a Llama cannot have keeps its own, which needs remote code.
    """
    if model.model_type == "INTERNLM3" and _unexportable_biases(model, "llama"):
        return "internlm3"
    return OWN_ARCHITECTURE.get(model.model_type, "llama")


@dataclass(frozen=True)
class SpecialTokenIds:
    """Ids of special tokens; ``eos`` may have several, of which config.json gets the first."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None = None


@dataclass(frozen=True)
class RotaryScaling:
    """The treatment of positions from ``max_position`` on: "dynamic" stretches the rotary base, "origin" does not."""

    type: RotaryType
    factor: float
    max_position: int


# Of architectures whose published code reads some kinds only; transformers itself reads
# the angles of the others.
SCALINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"phi3": ("longrope",), "baichuan": (), "internlm2": ("dynamic", "linear")}
)


def rotary_scaling(
    model: ModelConfig,
    seq_len: int,
    *,
    type: RotaryType | None = None,
    factor: float | None = None,
    max_position: int | None = None,
) -> RotaryScaling:
    """Return the scaling the model was trained with, unless an argument overrides it.

    Args:
        seq_len: length of the training data, the least ``max_position`` without dynamic NTK.
    Raises:
        CheckpointError: an argument would replace the model's ``rope_scaling``.
    """
    scaling = model.rope_scaling
    if scaling is not None and (type is not None or factor is not None):
        raise CheckpointError(
            f"the model has rope_scaling of type {scaling.type!r}, which no other rotary scaling can replace",
            where="--rotary-type, --scaling-factor",
            fix="leave them out: the folder gets the model's scaling",
            code="EVO-HF-004",
        )
    chosen = type or model.rotary_type
    trained = model.max_position_embeddings
    if chosen == "origin" and (scaling is None or scaling.type != "longrope"):
        trained = max(trained, seq_len)
    return RotaryScaling(
        chosen, factor or model.rope_scaling_factor, max_position or trained
    )


def refuse_unexportable(
    model: ModelConfig, arch: Architecture, rotary: RotaryScaling
) -> None:
    """Check that the architecture can represent the model, with the rotary positions of the export.

    Raises:
        CheckpointError: it cannot; the fix names the architectures that can.
    """
    setting = unexportable_setting(model, arch, rotary)
    if setting is None:
        return
    possible = []
    for other in CLASSES:
        if unexportable_setting(model, other, rotary) is None:
            possible.append(f"--arch {other}")
    fix = f"export it as another one: {' or '.join(possible)}"
    if not possible:
        fix = "keep the native checkpoint: no other architecture can represent it"
    raise CheckpointError(
        f"{setting} cannot be represented in the {arch} architecture",
        where="the checkpoint's model section",
        expected=f"settings that {CLASSES[arch]} has",
        fix=fix,
        code="EVO-HF-004",
    )


def unexportable_setting(
    model: ModelConfig, arch: Architecture, rotary: RotaryScaling
) -> str | None:
    """Return a setting of the model that the architecture cannot represent, None without one."""
    known = {facts.family for facts in HUGGING_FACE_FACTS.values()}
    if model.model_type not in known:
        return f"the custom model_type {model.model_type!r}"
    if model.norm_type != "rmsnorm":
        return f"norm_type {model.norm_type!r}"
    if not model.use_swiglu:
        return "use_swiglu=False"
    if model.apply_post_layer_norm and model.model_type == "INTERNLM2_PUBLIC":
        return "apply_post_layer_norm=True"
    setting = (
        _unexportable_head(model, arch)
        or _unexportable_attention(model, arch)
        or _unexportable_layers(model, arch)
    )
    differing = differing_key(model, HUGGING_FACE_FACTS[arch].family)
    if setting is None and differing is not None:
        setting = f"{differing}={getattr(model, differing)!r}"
    return setting or _unexportable_positions(model, arch, rotary)


def _unexportable_head(model: ModelConfig, arch: Architecture) -> str | None:
    """Return the settings of the output head that another architecture than ``arch`` has, None without one."""
    if model.tie_word_embeddings and model.norm_head:
        return "norm_head=True with tie_word_embeddings=True"
    # Its readers decide by the vocabulary whether to normalize the rows.
    is_normalized = model.vocab_size != BAICHUAN_1_VOCAB
    if arch == "baichuan" and model.norm_head != is_normalized:
        return f"norm_head={model.norm_head} with vocab_size={model.vocab_size}"
    return None


def _unexportable_layers(model: ModelConfig, arch: Architecture) -> str | None:
    """Return what some layers have and no layer of ``arch`` may have, None without one."""
    family = FAMILY_FACTS[HUGGING_FACE_FACTS[arch].family]
    if model.sliding_window is not None and not family.sliding_window:
        return f"sliding_window={model.sliding_window}"
    if model.layer_types is not None and not family.layer_types:
        return "layer_types"
    if model.nope_layers and not family.nope_layers:
        return f"nope_layers={model.nope_layers}"
    return None


def _unexportable_attention(model: ModelConfig, arch: Architecture) -> str | None:
    """Return the setting of the attention that another architecture than ``arch`` has, None without one."""
    family = FAMILY_FACTS[HUGGING_FACE_FACTS[arch].family]
    biases = _unexportable_biases(model, arch)
    if biases is not None:
        return biases
    if model.qk_norm != bool(family.qk_norm):
        return f"qk_norm={model.qk_norm}"
    if not family.grouped and model.kv_heads != model.num_attention_heads:
        return f"num_kv_attention_heads={model.kv_heads}"
    scalar = model.query_pre_attn_scalar
    if scalar is not None and scalar != int(scalar):
        return f"query_pre_attn_scalar={scalar}, which is an integer there,"
    if "local_rope_base" in family.free and _scales_windows(model):
        return "rope_scaling of layers with a window, or dynamic NTK,"
    if model.head_dim * model.num_attention_heads != model.hidden_size and arch in (
        "qwen2",
        "internlm2",
        "baichuan",
    ):
        return f"head_dim={model.head_dim}"
    return None


def _unexportable_positions(
    model: ModelConfig, arch: Architecture, rotary: RotaryScaling
) -> str | None:
    """Return the rotary scaling or base that the readers of an architecture do not know, None without one."""
    scaling = "dynamic" if rotary.type == "dynamic" else None
    if model.rope_scaling is not None:
        scaling = model.rope_scaling.type
    possible = SCALINGS.get(arch)
    if possible is not None and scaling is not None and scaling not in possible:
        return f"rotary scaling {scaling!r}"
    if arch == "baichuan" and model.rope_base != BAICHUAN_ROPE_BASE:
        return f"rope_base={model.rope_base:g}"
    return None


def _scales_windows(model: ModelConfig) -> bool:
    """Return whether layers with a window have scaled angles, which a family with two rope bases cannot say."""
    shares_angles = model.sliding_window is not None and model.local_rope_base is None
    return shares_angles and (
        model.rope_scaling is not None or model.use_dynamic_ntk_rope
    )


def _bias_switches(model: ModelConfig, arch: Architecture) -> list[tuple[Switch, bool]]:
    """Return (switch of the architecture, value that the model needs) of each of its biases."""
    facts = HUGGING_FACE_FACTS[arch]
    return [
        (facts.qkv_bias, model.has_qkv_bias),
        (facts.o_bias, model.has_o_bias),
        (facts.mlp_bias, model.mlp_bias),
    ]


def _unexportable_biases(model: ModelConfig, arch: Architecture) -> str | None:
    """Return the biases of a model if the architecture fixes one to another value, or has one key for two of them."""
    written: dict[str, bool] = {}
    for switch, value in _bias_switches(model, arch):
        possible = switch
        if isinstance(switch, str):
            possible = written.setdefault(switch, value)
        if possible != value:
            attention = f"qkv_bias={model.has_qkv_bias} with o_bias={model.has_o_bias}"
            return f"{attention} and mlp_bias={model.mlp_bias}"
    return None


def _special_settings(
    model: ModelConfig,
    arch: Architecture,
    rotary: RotaryScaling,
    scaling: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the keys that no other architecture has."""
    settings: dict[Architecture, dict[str, Any]] = {
        "qwen2": _qwen_window(model),
        "qwen3": _qwen_window(model),
        "mistral": {"sliding_window": model.sliding_window},
        "phi3": _phi3_lengths(model, rotary),
        "smollm3": _smollm3_layers(model),
        "gemma": _gemma(model, arch),
        "gemma2": _gemma(model, arch) | _gemma_window(model),
        "gemma3_text": _gemma3(model, arch, scaling),
    }
    return settings.get(arch, {})


def build_config(
    model: ModelConfig,
    arch: Architecture,
    rotary: RotaryScaling,
    ids: SpecialTokenIds,
    dtype: str,
) -> dict[str, Any]:
    """Return the content of config.json."""
    # 1. What only some architectures have.
    scaling = _scaling_record(model, rotary)
    internlm = {
        "type": rotary.type,
        "base": model.rope_base,
        "scaling_factor": rotary.factor,
    }
    special = _special_settings(model, arch, rotary, scaling)
    biases = {
        switch: value
        for switch, value in _bias_switches(model, arch)
        if isinstance(switch, str)
    }

    # 2. What all have. Angles stand there twice: older versions of transformers read
    #    rope_theta and rope_scaling, newer ones rope_parameters.
    return {
        "architectures": [CLASSES[arch]],
        "model_type": arch,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": HUGGING_FACE_FACTS[arch].activations[0],
        "initializer_range": 0.02,
        "rms_norm_eps": model.layer_norm_epsilon,
        "max_position_embeddings": rotary.max_position,
        "rope_theta": model.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": model.rope_base,
        },
        **({} if model.rope_scaling else {"rotary": internlm}),
        **biases,
        **special,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos[0] if ids.eos else None,
        "pad_token_id": ids.pad,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _qwen_window(model: ModelConfig) -> dict[str, Any]:
    """Return Qwen's settings of the window: which layers have it, and for older readers the first that has."""
    windows = [model.window_of(layer) for layer in range(model.num_layers)]
    types = [
        "full_attention" if window is None else "sliding_attention"
        for window in windows
    ]
    full_layers = types.index("sliding_attention") if any(windows) else len(types)
    return {
        "use_sliding_window": any(windows),
        "sliding_window": model.sliding_window,
        "max_window_layers": full_layers,
        "layer_types": types,
    }


def _phi3_lengths(model: ModelConfig, rotary: RotaryScaling) -> dict[str, Any]:
    """Return Phi-3's window and original length, which readers take from here, not from the settings of longrope."""
    scaling = model.rope_scaling
    original = scaling.original_max_position_embeddings if scaling else None
    return {
        "sliding_window": model.sliding_window,
        "original_max_position_embeddings": original or rotary.max_position,
    }


def _smollm3_layers(model: ModelConfig) -> dict[str, Any]:
    """Return SmolLM3's settings of its layers: 1 for a layer that rotates, and which of them have the window."""
    window = _qwen_window(model)
    del window["max_window_layers"]
    rotates = [int(model.rotates(layer)) for layer in range(model.num_layers)]
    return {"no_rope_layers": rotates, **window}


def _gemma(model: ModelConfig, arch: Architecture) -> dict[str, Any]:
    """Return Gemma's name of the activation, and its settings of scores and logits."""
    facts = HUGGING_FACE_FACTS[arch]
    settings: dict[str, Any] = {"hidden_activation": facts.activations[0]}
    for key in FAMILY_FACTS[facts.family].free:
        settings[key] = getattr(model, key)
    settings.pop("local_rope_base", None)
    if "query_pre_attn_scalar" in settings:
        # An integer: transformers takes no other number.
        settings["query_pre_attn_scalar"] = int(
            model.query_pre_attn_scalar or model.head_dim
        )
    return settings


def _gemma_window(model: ModelConfig) -> dict[str, Any]:
    """Return which layers have the window; transformers wants a number even if none has."""
    windows = _qwen_window(model)
    return {
        "sliding_window": model.sliding_window or 4096,
        "layer_types": windows["layer_types"],
    }


def _gemma3(
    model: ModelConfig, arch: Architecture, scaling: dict[str, Any] | None
) -> dict[str, Any]:
    """Return also the rotary settings of layers with and without a window, in the newer and the older spelling."""
    local_base = model.local_rope_base or model.rope_base
    everywhere = {
        **(scaling or {"rope_type": "default"}),
        "rope_theta": model.rope_base,
    }
    return {
        **_gemma(model, arch),
        **_gemma_window(model),
        "rope_local_base_freq": local_base,
        "rope_parameters": {
            "full_attention": everywhere,
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
    }


def _scaling_record(model: ModelConfig, rotary: RotaryScaling) -> dict[str, Any] | None:
    """Return ``rope_scaling`` of config.json, with the newer and the older name of its type; None for plain angles."""
    if model.rope_scaling is not None:
        settings = model.rope_scaling.model_dump(
            mode="json", exclude={"type"}, exclude_none=True
        )
        return {
            "rope_type": model.rope_scaling.type,
            "type": model.rope_scaling.type,
            **settings,
        }
    if rotary.type == "dynamic":
        return {
            "rope_type": "dynamic",
            "type": "dynamic",
            "factor": float(rotary.factor),
        }
    return None


def build_generation_config(ids: SpecialTokenIds) -> dict[str, Any]:
    """Return the content of generation_config.json: one eos id is a number, several are a list."""
    eos: int | list[int] | None = list(ids.eos) or None
    if len(ids.eos) == 1:
        eos = ids.eos[0]
    return {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}


def read_config(
    record: dict[str, Any], where: str, dtype: str | None = None
) -> ModelConfig:
    """Return ``read_model`` of a config.json.

    Raises:
        CheckpointError: an architecture or a setting that cannot be represented here, or a key that is absent.
    """
    try:
        return read_model(record, where, dtype)
    except UserError as error:
        raise CheckpointError(
            error.found,
            where=error.where,
            expected=error.expected,
            fix=error.fix,
            code=error.code,
        ) from None
