"""Read the sizes of a model from ``config.json`` of a Hugging Face folder; without torch.

Newer files have ``dtype`` and ``rope_parameters``, older ones ``torch_dtype``,
``rope_theta`` and ``rope_scaling``: either is read. ``rotary.type`` is InternLM's word
for the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from evomesh.config.families import FAMILY_FACTS
from evomesh.config.hugging_face_architecture import (
    architecture_settings,
    local_rope_base,
)
from evomesh.config.hugging_face_facts import (
    HUGGING_FACE_FACTS,
    HuggingFaceFacts,
    Switch,
)
from evomesh.config.hugging_face_record import ConfigRecord, LayerReader, joined
from evomesh.config.rope import (
    OPTIONAL,
    REQUIRED,
    RopeScaling,
    RopeType,
    scaling_problems,
)
from evomesh.config.schema import DType, ModelConfig
from evomesh.errors import UserError
from evomesh.user_files import read_json

BAICHUAN_1_VOCAB = 64000

# Of rope_scaling or rope_parameters, but no settings of a scaling.
SETTINGS_BESIDE_SCALING = (
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "finetuned",
)


def read_model_folder(folder: Path) -> ModelConfig:
    """Return the model section of a local folder.

    Raises:
        UserError: no readable ``config.json``, or a model that evomesh cannot represent.
    """
    file = folder / "config.json"
    record = read_json(file, expected="a Hugging Face model folder")
    if not isinstance(record, dict):
        raise UserError(
            f"a JSON {type(record).__name__}",
            where=str(file),
            expected="a JSON object",
            code="EVO-HF-011",
        )
    return read_model(record, str(file))


def read_model(
    record: dict[str, Any], where: str, dtype: str | None = None
) -> ModelConfig:
    """Return the model section that computes what ``config.json`` describes; rotary pairs are in halves there.

    Args:
        record: the content of config.json.
        dtype: of the parameters; None: the folder's.
    Raises:
        UserError: an architecture or a setting that cannot be represented here, or a key that is absent.
    """
    facts = _facts_of(record, where)
    reader = _ConfigReader(record, where, facts)
    hidden = reader.positive_integer("hidden_size")
    heads = reader.positive_integer("num_attention_heads")
    width = reader.positive_integer("intermediate_size")
    reader.refuse_unsupported(hidden, heads)
    head_dim = reader.head_dim(hidden, heads)
    scaling = reader.dynamic_factor()
    biases = reader.bias_settings()
    family = facts.family
    # Our INTERNLM always has biases.
    if family == "INTERNLM" and biases["no_bias"]:
        family = "LLAMA2"
    mlp_ratio, multiple_of = _mlp_ratio(width, hidden)
    settings: dict[str, Any] = dict(
        model_type=family,
        num_layers=reader.positive_integer("num_hidden_layers"),
        hidden_size=hidden,
        vocab_size=reader.positive_integer("vocab_size"),
        num_attention_heads=heads,
        num_kv_attention_heads=(
            None if family == "INTERNLM" else reader.kv_heads(heads)
        ),
        mlp_ratio=mlp_ratio,
        multiple_of=multiple_of,
        dtype=reader.dtype(dtype),
        head_dim=head_dim,
        **biases,
        qk_norm=bool(FAMILY_FACTS[family].qk_norm),
        **LayerReader(record, where, facts).settings(),
        layer_norm_epsilon=reader.number("rms_norm_eps", 1e-6),
        qk_interleaved=False,
        rope_base=reader.rope_base(),
        use_dynamic_ntk_rope=scaling is not None,
        rope_scaling_factor=scaling or 1.0,
        max_position_embeddings=reader.max_position(),
        rope_scaling=reader.rope_scaling(head_dim),
        **reader.head_settings(),
        **architecture_settings(record, where, facts, head_dim),
    )
    settings["local_rope_base"] = reader.local_rope_base(settings)
    return reader.validated(settings)


def _facts_of(record: dict[str, Any], where: str) -> HuggingFaceFacts:
    """Return the facts of the architecture that a config.json names.

    Raises:
        UserError: it is unknown.
    """
    kind = record.get("model_type")
    if not isinstance(kind, str) or kind not in HUGGING_FACE_FACTS:
        raise UserError(
            f"unknown architecture: model_type {kind!r} ({joined(record.get('architectures'))})",
            where=where,
            expected=f"one of {', '.join(HUGGING_FACE_FACTS)}",
            fix=_fix_of_unknown(record),
            code="EVO-HF-009",
        )
    return HUGGING_FACE_FACTS[kind]


def _fix_of_unknown(record: dict[str, Any]) -> str:
    inner = record.get("text_config")
    if isinstance(inner, dict) and inner.get("model_type") in HUGGING_FACE_FACTS:
        return (
            f"its language model is of type {inner['model_type']!r}: save that alone with transformers, "
            "and import that folder"
        )
    return "import a folder of one of these, or write the model yourself: evomesh.register_model"


def _mlp_ratio(width: int, hidden: int) -> tuple[float, int]:
    """Return ``mlp_ratio`` and ``multiple_of`` that give an mlp of exactly this width."""
    multiple = math.gcd(width, 256)
    if multiple > 1:
        return width / hidden, multiple
    # Nothing rounds up then, and int(hidden * ratio) must not fall below the width:
    # half a unit more.
    return (width + 0.5) / hidden, multiple


class _ConfigReader(ConfigRecord):
    """Reads and checks settings of a config.json."""

    def kv_heads(self, heads: int) -> int:
        """Return the number of key/value heads; absent or null, it is that of the query heads."""
        if self.record.get("num_key_value_heads") is None:
            return heads
        return self.positive_integer("num_key_value_heads")

    def validated(self, settings: dict[str, Any]) -> ModelConfig:
        """Return the model section of the settings that were read.

        Raises:
            UserError: values that no model can have, such as heads of an odd width.
        """
        try:
            return ModelConfig(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            found = f"{key} is {first['input']!r}: " if key else ""
            raise UserError(
                f"{found}{first['msg']}",
                where=self.where,
                expected="the sizes of a model",
                code="EVO-HF-011",
            ) from None

    def dtype(self, override: str | None) -> DType:
        record = self.record
        found = (
            override or record.get("dtype") or record.get("torch_dtype") or "float32"
        )
        if found not in get_args(DType):
            raise UserError(
                f"dtype {found!r}",
                where=self.where,
                expected=", ".join(get_args(DType)),
                code="EVO-HF-011",
            )
        return cast(DType, found)

    def refuse_unsupported(self, hidden: int, heads: int) -> None:
        """Check the settings that have no counterpart here.

        Raises:
            UserError: one of them is in use.
        """
        head_dim = self.record.get("head_dim")
        kv_heads = self.record.get("num_key_value_heads")
        groups = self.kv_heads(heads)
        setting = None
        if self.record.get("mlp_bias") and not self.facts.mlp_bias:
            setting = "mlp_bias"
        elif self._partial_rotary() != 1:
            setting = f"partial_rotary_factor {self._partial_rotary()}"
        elif hidden % heads != 0 and head_dim is None:
            setting = f"hidden_size {hidden} with {heads} heads"
        elif self.record.get("model_type") == "internlm" and kv_heads not in (
            None,
            heads,
        ):
            setting = "GQA"
        elif heads % groups != 0:
            setting = f"{heads} attention heads with {groups} key/value heads"
        if setting:
            raise UserError(
                f"{setting} is not supported", where=self.where, code="EVO-HF-010"
            )
        if self.facts.family == "BAICHUAN2":
            self._refuse_alibi(hidden)

    def _refuse_alibi(self, hidden: int) -> None:
        """Refuse Baichuan 13B: it has another width than 7B, and another name for its length."""
        if hidden != 5120 and "max_position_embeddings" in self.record:
            return
        raise UserError(
            f"hidden_size {hidden} without max_position_embeddings: Baichuan 13B, whose attention adds ALiBi biases "
            "to the scores instead of rotating queries and keys",
            where=self.where,
            expected="rotary positions, as in Baichuan 7B and Baichuan2 7B",
            fix="take Baichuan2-7B, or another family",
            code="EVO-HF-010",
        )

    def local_rope_base(self, settings: Mapping[str, Any]) -> float | None:
        """Return the rotary base of layers with a window, None where they have the angles of all layers."""
        if settings["sliding_window"] is None:
            return None
        base = local_rope_base(self.record, self.where, self.facts)
        is_scaled = settings["rope_scaling"] or settings["use_dynamic_ntk_rope"]
        return None if base == settings["rope_base"] and not is_scaled else base

    def head_settings(self) -> dict[str, bool]:
        """Return whether the output head is the embedding, and whether its rows are normalized.

        They are in Baichuan2, which has another vocabulary than Baichuan.
        """
        vocab_size = self.positive_integer("vocab_size")
        is_baichuan = self.facts.family == "BAICHUAN2"
        return {
            "tie_word_embeddings": bool(
                self.record.get("tie_word_embeddings", self.facts.tied)
            ),
            "norm_head": is_baichuan and vocab_size != BAICHUAN_1_VOCAB,
        }

    def head_dim(self, hidden: int, heads: int) -> int:
        """Return the width of a head; where the file has none, what transformers takes for its type."""
        if self.record.get("head_dim") is not None:
            return self.positive_integer("head_dim")
        return self.facts.head_dim or hidden // heads

    def bias_settings(self) -> dict[str, Any]:
        """Return ``no_bias``, ``o_bias`` and ``mlp_bias`` of the model section."""
        qkv_bias = self._bias(self.facts.qkv_bias)
        o_bias = self._bias(self.facts.o_bias)
        return {
            "no_bias": not qkv_bias,
            "o_bias": None if o_bias == qkv_bias else o_bias,
            "mlp_bias": self._bias(self.facts.mlp_bias),
        }

    def _bias(self, switch: Switch) -> bool:
        """Return whether a model has a bias that is switched by a key, or that every model of its type has or lacks."""
        if isinstance(switch, bool):
            return switch
        return bool(self.record.get(switch, self.facts.bias_default))

    def _partial_rotary(self) -> float:
        key = "partial_rotary_factor"
        of_rope = self._rope().get(key)
        value = of_rope or self.record.get(key) or 1
        return self.as_number(key, value)

    def _rope(self) -> dict[str, Any]:
        """Return the rotary settings: the newer spelling before the older one, InternLM's last.

        But InternLM's ``rotary.type`` "origin" comes first: editing this one word must
        turn dynamic scaling off, as InternEvo's guide describes.
        """
        newer = self.mapping("rope_parameters")
        # Gemma 3 has settings for each kind of layer; those of windows are its local base.
        newer = newer.get("full_attention") or newer
        rope = self.mapping("rope_scaling") | newer
        rotary = self.mapping("rotary")
        kind = rotary.get("type")
        if not kind:
            return rope
        has_other_spelling = self.record.keys() & {"rope_scaling", "rope_parameters"}
        if kind == "origin" or not has_other_spelling:
            factor = rope.get("factor", 1.0)
            rope["factor"] = rotary.get("scaling_factor", factor)
            rope["rope_type"] = kind
        return rope

    def dynamic_factor(self) -> float | None:
        """Return the factor of dynamic NTK scaling, None without scaling."""
        if self._rope_type() != "dynamic":
            return None
        return self.as_number("factor", self._rope().get("factor", 1.0))

    def _rope_type(self) -> str:
        rope = self._rope()
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if not isinstance(kind, str):
            raise UserError(
                f"rope_type is {kind!r}",
                where=self.where,
                expected="a name",
                code="EVO-HF-011",
            )
        other_names = {"origin": "default", "su": "longrope"}
        return other_names.get(kind, kind)

    def rope_scaling(self, head_dim: int) -> RopeScaling | None:
        """Return the scaling of a type other than dynamic NTK, None for plain angles.

        Raises:
            UserError: an unknown type, or settings that the type lacks or does not know.
        """
        kind = self._rope_type()
        if kind in ("default", "dynamic"):
            return None
        if kind not in REQUIRED:
            known = ", ".join(("default", "dynamic", *REQUIRED))
            raise UserError(
                f"rotary scaling {kind!r} is not supported",
                where=self.where,
                expected=f"one of {known}",
                code="EVO-HF-010",
            )
        try:
            scaling = RopeScaling.model_validate(
                self._scaling_settings(kind), strict=False
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"rope_scaling: {first['loc'][0]} is {first['input']!r}: {first['msg']}",
                where=self.where,
                code="EVO-HF-011",
            ) from None
        problems = scaling_problems(scaling, head_dim)
        if problems:
            key, found, expected = problems[0]
            raise UserError(
                f"rope_scaling: {key}: {found}",
                where=self.where,
                expected=expected,
                code="EVO-HF-011",
            )
        return scaling

    def _scaling_settings(self, kind: RopeType) -> dict[str, Any]:
        """Return the fields of a ``RopeScaling``; the original length may be beside them, or be the model's."""
        settings = {
            key: value
            for key, value in self._rope().items()
            if key not in SETTINGS_BESIDE_SCALING
        }
        original = "original_max_position_embeddings"
        if original in REQUIRED[kind] and settings.get(original) is None:
            settings[original] = self.record.get(original) or self.max_position()
        unknown = sorted(settings.keys() - {*REQUIRED[kind], *OPTIONAL[kind]})
        if unknown:
            raise UserError(
                f"rotary scaling {kind!r} has settings that are not known: {', '.join(unknown)}",
                where=self.where,
                code="EVO-HF-010",
            )
        return {"type": kind, **settings}

    def max_position(self) -> int:
        if self.record.get("max_position_embeddings") is None:
            return self.facts.max_position
        return self.positive_integer("max_position_embeddings")

    def rope_base(self) -> float:
        rotary = self.mapping("rotary")
        base = (
            self._rope().get("rope_theta")
            or self.record.get("rope_theta")
            or rotary.get("base")
        )
        return self.as_number("rope_theta", base or self.facts.rope_base)
