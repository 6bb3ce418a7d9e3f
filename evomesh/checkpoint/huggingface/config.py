"""Convert between ``config.json`` with ``generation_config.json`` and our config sections.

Newer readers look at ``dtype`` and ``rope_parameters``, older ones at ``torch_dtype``, ``rope_theta`` and
``rope_scaling``: both spellings are written, and either is read. ``rotary.type`` is InternLM's word for the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import DType, ModelConfig, RotaryType

Architecture = Literal["llama", "internlm2"]
CLASSES = {"llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM"}
FAMILIES = {"llama": "LLAMA2", "internlm": "INTERNLM", "internlm2": "INTERNLM2_PUBLIC"}


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
    """
    chosen = type or model.rotary_type
    trained = model.max_position_embeddings
    if chosen == "origin":
        trained = max(trained, seq_len)
    return RotaryScaling(chosen, factor or model.rope_scaling_factor, max_position or trained)


def refuse_unexportable(model: ModelConfig, arch: Architecture) -> None:
    """Check that the architecture can represent the model.

    Raises:
        CheckpointError: it cannot.
    """
    setting = None
    if model.model_type not in FAMILIES.values():
        setting = f"the custom model_type {model.model_type!r}"
    elif model.norm_type != "rmsnorm":
        setting = f"norm_type {model.norm_type!r}"
    elif not model.use_swiglu:
        setting = "use_swiglu=False"
    elif model.apply_post_layer_norm and model.model_type == "INTERNLM2_PUBLIC":
        setting = "apply_post_layer_norm=True"
    if setting:
        raise CheckpointError(
            f"{setting} cannot be represented in the {arch} architecture",
            where="the checkpoint's model section",
            expected=f"{', '.join(FAMILIES.values())} with rmsnorm, use_swiglu and norms before the blocks",
        )


def build_config(
    model: ModelConfig, arch: Architecture, rotary: RotaryScaling, ids: SpecialTokenIds, dtype: str
) -> dict[str, Any]:
    """Return the content of config.json."""
    scaling = None
    if rotary.type == "dynamic":
        scaling = {"rope_type": "dynamic", "type": "dynamic", "factor": float(rotary.factor)}
    if arch == "llama":
        biases = {"attention_bias": not model.no_bias, "mlp_bias": False}
    else:
        biases = {"bias": not model.no_bias}
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
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": model.layer_norm_epsilon,
        "max_position_embeddings": rotary.max_position,
        "rope_theta": model.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_base},
        "rotary": {"type": rotary.type, "base": model.rope_base, "scaling_factor": rotary.factor},
        **biases,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos[0] if ids.eos else None,
        "pad_token_id": ids.pad,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def build_generation_config(ids: SpecialTokenIds) -> dict[str, Any]:
    """Return the content of generation_config.json: one eos id is a number, several are a list."""
    eos: int | list[int] | None = list(ids.eos) or None
    if len(ids.eos) == 1:
        eos = ids.eos[0]
    return {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}


def read_config(record: dict[str, Any], where: str, dtype: str | None = None) -> ModelConfig:
    """Return the model section that computes what ``config.json`` describes; rotary pairs are in halves there.

    Args:
        record: the content of config.json.
        dtype: of the parameters; None: the folder's.
    Raises:
        CheckpointError: an architecture or a setting that cannot be represented here, or a key that is absent.
    """
    kind = record.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"unknown architecture: model_type {kind!r} ({_joined(record.get('architectures'))})",
            where=where,
            expected=f"one of {', '.join(FAMILIES)}",
        )
    reader = _ConfigReader(record, where)
    hidden = reader.positive_integer("hidden_size")
    heads = reader.positive_integer("num_attention_heads")
    width = reader.positive_integer("intermediate_size")
    reader.refuse_unsupported(hidden, heads)
    scaling = reader.dynamic_factor()
    bias = bool(record.get("attention_bias" if kind == "llama" else "bias", kind == "internlm"))
    family = FAMILIES[kind]
    if family == "INTERNLM" and not bias:  # our INTERNLM always has biases
        family = "LLAMA2"
    kv_heads = record.get("num_key_value_heads") or heads
    mlp_ratio, multiple_of = _mlp_ratio(width, hidden)
    return ModelConfig(
        model_type=family,
        num_layers=reader.positive_integer("num_hidden_layers"),
        hidden_size=hidden,
        vocab_size=reader.positive_integer("vocab_size"),
        num_attention_heads=heads,
        num_kv_attention_heads=None if family == "INTERNLM" else kv_heads,
        mlp_ratio=mlp_ratio,
        multiple_of=multiple_of,
        dtype=reader.dtype(dtype),
        layer_norm_epsilon=float(record.get("rms_norm_eps", 1e-6)),
        no_bias=not bias,
        qk_interleaved=False,
        rope_base=reader.rope_base(),
        use_dynamic_ntk_rope=scaling is not None,
        rope_scaling_factor=scaling or 1.0,
        max_position_embeddings=int(record.get("max_position_embeddings", 2048)),
    )


def _mlp_ratio(width: int, hidden: int) -> tuple[float, int]:
    """Return ``mlp_ratio`` and ``multiple_of`` that give an mlp of exactly this width."""
    multiple = math.gcd(width, 256)
    if multiple > 1:
        return width / hidden, multiple
    # Nothing rounds up then, and int(hidden * ratio) must not fall below the width: half a unit more.
    return (width + 0.5) / hidden, multiple


@dataclass(frozen=True)
class _ConfigReader:
    """Reads and checks settings of a config.json."""

    record: dict[str, Any]
    where: str

    def positive_integer(self, key: str) -> int:
        value = self.record.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{key} is {value!r}", where=self.where, expected="a positive integer")
        return value

    def dtype(self, override: str | None) -> DType:
        record = self.record
        found = override or record.get("dtype") or record.get("torch_dtype") or "float32"
        if found not in get_args(DType):
            raise CheckpointError(f"dtype {found!r}", where=self.where, expected=", ".join(get_args(DType)))
        return cast(DType, found)

    def refuse_unsupported(self, hidden: int, heads: int) -> None:
        """Check the settings that have no counterpart here.

        Raises:
            CheckpointError: one of them is in use.
        """
        activation = self.record.get("hidden_act", "silu")
        head_dim = self.record.get("head_dim")
        kv_heads = self.record.get("num_key_value_heads")
        setting = None
        if activation not in ("silu", "swish"):
            setting = f"hidden_act {activation!r}"
        elif self.record.get("mlp_bias"):
            setting = "mlp_bias"
        elif hidden % heads != 0:
            setting = f"hidden_size {hidden} with {heads} heads"
        elif head_dim not in (None, hidden // heads):
            setting = f"head_dim {head_dim}"
        elif self.record.get("model_type") == "internlm" and kv_heads not in (None, heads):
            setting = "GQA"
        if setting:
            raise CheckpointError(f"{setting} is not supported", where=self.where)

    def _rope(self) -> dict[str, Any]:
        """Return the rotary settings: the newer spelling before the older one, InternLM's last.

        But InternLM's ``rotary.type`` "origin" comes first: editing this one word must turn dynamic scaling off, as
        InternEvo's guide describes.
        """
        rope = {**(self.record.get("rope_scaling") or {}), **(self.record.get("rope_parameters") or {})}
        rotary = self.record.get("rotary") or {}
        has_other_spelling = self.record.keys() & {"rope_scaling", "rope_parameters"}
        if rotary.get("type") and (not has_other_spelling or rotary["type"] == "origin"):
            factor = rotary.get("scaling_factor", rope.get("factor", 1.0))
            rope |= {"rope_type": rotary["type"], "factor": factor}
        return rope

    def dynamic_factor(self) -> float | None:
        """Return the factor of dynamic NTK scaling, None without scaling."""
        rope = self._rope()
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind in ("default", "origin"):
            return None
        if kind != "dynamic":
            raise CheckpointError(
                f"rotary scaling {kind!r} is not supported", where=self.where, expected="none, or dynamic"
            )
        return float(rope.get("factor", 1.0))

    def rope_base(self) -> float:
        rotary = self.record.get("rotary") or {}
        base = self._rope().get("rope_theta") or self.record.get("rope_theta") or rotary.get("base")
        return float(base or 10000.0)


def _joined(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)
