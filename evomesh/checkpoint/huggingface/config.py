"""``config.json`` and ``generation_config.json`` from the config of a training, and back.

Newer readers look at ``dtype`` and ``rope_parameters``, older ones at ``torch_dtype``, ``rope_theta`` and
``rope_scaling``: both spellings are written, either is read. ``rotary.type`` is InternLM's word for the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import Config, DType, ModelConfig, RotaryType

Architecture = Literal["llama", "internlm2"]
CLASSES = {"llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM"}
FAMILIES = {"llama": "LLAMA2", "internlm": "INTERNLM", "internlm2": "INTERNLM2_PUBLIC"}


@dataclass(frozen=True)
class SpecialTokenIds:
    """Ids of special tokens; ``eos`` may have several, the first is the one config.json names."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None = None


@dataclass(frozen=True)
class RotaryScaling:
    """How positions beyond ``max_position`` are treated: "dynamic" stretches the base, "origin" does not."""

    type: RotaryType
    factor: float
    max_position: int


def rotary_of(
    config: Config,
    type: RotaryType | None = None,
    factor: float | None = None,
    max_position: int | None = None,
) -> RotaryScaling:
    """As trained, unless told otherwise. Without dynamic NTK, the limit is at least the length of the training data."""
    model = config.model
    chosen = type or model.rotary_type
    trained = model.max_position_embeddings
    if chosen == "origin":
        trained = max(trained, config.data.seq_len)
    return RotaryScaling(chosen, factor or model.rope_scaling_factor, max_position or trained)


def refuse_unexportable(model: ModelConfig, arch: Architecture) -> None:
    """
    Raises:
        CheckpointError: a model that the architecture has no form for.
    """
    reasons = [
        (
            model.model_type not in FAMILIES.values(),
            f"model_type {model.model_type!r} is a model of your own",
        ),
        (model.norm_type != "rmsnorm", f"norm_type {model.norm_type!r}"),
        (not model.use_swiglu, "use_swiglu=False"),
        (
            model.apply_post_layer_norm and model.model_type == "INTERNLM2_PUBLIC",
            "apply_post_layer_norm=True",
        ),
    ]
    for wrong, words in reasons:
        if wrong:
            raise CheckpointError(
                f"{words} has no form in the {arch} architecture",
                where="the checkpoint's model section",
                expected=f"{', '.join(FAMILIES.values())} with rmsnorm, use_swiglu and norms before the blocks",
            )


def write_config(
    model: ModelConfig, arch: Architecture, rotary: RotaryScaling, ids: SpecialTokenIds, dtype: str
) -> dict[str, Any]:
    """The content of config.json."""
    dynamic = rotary.type == "dynamic"
    scaling = {"rope_type": "dynamic", "type": "dynamic", "factor": float(rotary.factor)} if dynamic else None
    bias = (
        {"attention_bias": not model.no_bias, "mlp_bias": False}
        if arch == "llama"
        else {"bias": not model.no_bias}
    )
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
        **bias,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos[0] if ids.eos else None,
        "pad_token_id": ids.pad,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def write_generation_config(ids: SpecialTokenIds) -> dict[str, Any]:
    eos: int | list[int] | None = list(ids.eos) if len(ids.eos) > 1 else (ids.eos[0] if ids.eos else None)
    return {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}


def read_config(record: dict[str, Any], where: str, dtype: str | None = None) -> ModelConfig:
    """The model section that computes what ``config.json`` describes; rotary pairs are halves, as in such folders.

    Raises:
        CheckpointError: an architecture or a setting that has no form here, or a key that is absent.
    """
    kind = record.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"unknown architecture: model_type {kind!r} ({_listed(record.get('architectures'))})",
            where=where,
            expected=f"one of {', '.join(FAMILIES)}",
        )
    reader = _ConfigReader(record, where)
    hidden, heads = reader.whole("hidden_size"), reader.whole("num_attention_heads")
    width = reader.whole("intermediate_size")
    reader.refuse(hidden, heads)
    scaling = reader.scaling()
    bias = bool(record.get("attention_bias" if kind == "llama" else "bias", kind == "internlm"))
    family = FAMILIES[kind] if bias or kind != "internlm" else "LLAMA2"  # ours always has biases in INTERNLM
    found = dtype or record.get("dtype") or record.get("torch_dtype") or "float32"
    if found not in get_args(DType):
        raise CheckpointError(f"dtype {found!r}", where=where, expected=", ".join(get_args(DType)))
    multiple = math.gcd(width, 256)
    kv_heads = record.get("num_key_value_heads") or heads
    return ModelConfig(
        model_type=family,
        num_layers=reader.whole("num_hidden_layers"),
        hidden_size=hidden,
        vocab_size=reader.whole("vocab_size"),
        num_attention_heads=heads,
        num_kv_attention_heads=None if family == "INTERNLM" else kv_heads,
        # Half a unit up where nothing rounds up: int(hidden * ratio) must not fall below the width.
        mlp_ratio=width / hidden if multiple > 1 else (width + 0.5) / hidden,
        multiple_of=multiple,
        dtype=cast(DType, found),
        layer_norm_epsilon=float(record.get("rms_norm_eps", 1e-6)),
        no_bias=not bias,
        qk_interleaved=False,
        rope_base=reader.rope_base(),
        use_dynamic_ntk_rope=scaling is not None,
        rope_scaling_factor=scaling or 1.0,
        max_position_embeddings=int(record.get("max_position_embeddings", 2048)),
    )


@dataclass(frozen=True)
class _ConfigReader:
    record: dict[str, Any]
    where: str

    def whole(self, key: str) -> int:
        value = self.record.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{key} is {value!r}", where=self.where, expected="a whole number from 1 on"
            )
        return value

    def refuse(self, hidden: int, heads: int) -> None:
        record = self.record
        wrong = [
            (
                record.get("hidden_act", "silu") not in ("silu", "swish"),
                f"hidden_act {record.get('hidden_act')!r}",
            ),
            (bool(record.get("mlp_bias")), "mlp_bias"),
            (hidden % heads != 0, f"{heads} heads in a width of {hidden}"),
            (record.get("head_dim") not in (None, hidden // heads), f"head_dim {record.get('head_dim')}"),
            (
                record.get("model_type") == "internlm"
                and record.get("num_key_value_heads") not in (None, heads),
                "GQA",
            ),
        ]
        for found, words in wrong:
            if found:
                raise CheckpointError(f"{words} is not supported", where=self.where)

    def _rope(self) -> dict[str, Any]:
        both = {**(self.record.get("rope_scaling") or {}), **(self.record.get("rope_parameters") or {})}
        rotary = self.record.get("rotary") or {}
        known = self.record.keys() & {"rope_scaling", "rope_parameters"}
        if rotary.get("type") and (not known or rotary["type"] == "origin"):
            # The documents' switch: editing rotary.type alone must turn dynamic scaling off.
            factor = rotary.get("scaling_factor", both.get("factor", 1.0))
            both = {**both, "rope_type": rotary["type"], "factor": factor}
        return both

    def scaling(self) -> float | None:
        """The factor of dynamic NTK, None without it."""
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
        return float(
            self._rope().get("rope_theta") or self.record.get("rope_theta") or rotary.get("base") or 10000.0
        )


def _listed(value: object) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )
