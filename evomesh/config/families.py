"""Facts of the built-in families: what their architectures fix, as values of the model section.

A new family is one row here, its name in ``ModelFamily``, and its initial weights in
``models/``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FamilyFacts:
    """Facts of one family.

    Attributes:
        defaults: keys of the model section whose default differs from the schema's.
        qkv_bias, o_bias, qk_norm: what every model of the family has; None: the config decides.
        sliding_window: whether the family may have a window.
        layer_types: whether it may have it in some of its layers only.
        architecture: values of ``ARCHITECTURE_KEYS`` that every model of the family has, where they are not the
            schema's defaults; None: the config decides about all of these keys.
        mlp_bias: whether its feed-forward networks may have biases.
        nope_interval: one of so many layers has no rotary positions by default; None: all layers of the family rotate.
        grouped: whether several query heads may share a key/value head.
        free: those of these keys that the config decides in a family that fixes the others.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool | None = None
    sliding_window: bool = False
    layer_types: bool = False
    architecture: dict[str, Any] | None = field(default_factory=dict)
    mlp_bias: bool = False
    free: tuple[str, ...] = ()
    nope_interval: int | None = None
    grouped: bool = True

    @property
    def nope_layers(self) -> bool:
        """Return whether the family may have layers without rotary positions."""
        return self.nope_interval is not None

    def may_have(self, key: str, value: Any) -> bool:
        """Return whether a model of the family may have this value, no default, of one of ``ARCHITECTURE_KEYS``."""
        if self.architecture is None or key in self.free:
            return True
        return bool(self.architecture.get(key) == value)


# Keys that tell the newer architectures apart. In a family of transformers they have one
# value each, or its folders could not say which; in InternEvo's families they are free.
ARCHITECTURE_KEYS = (
    "norm_placement",
    "qk_norm_over",
    "add_unit_offset",
    "scale_embeddings",
    "gate_activation",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "local_rope_base",
)

_GEMMA: dict[str, Any] = {
    "add_unit_offset": True,
    "scale_embeddings": True,
    "gate_activation": "gelu_tanh",
}
FAMILY_FACTS: dict[str, FamilyFacts] = {
    "INTERNLM": FamilyFacts(
        qkv_bias=True, o_bias=True, architecture=None, grouped=False
    ),
    "INTERNLM2_PUBLIC": FamilyFacts(architecture=None),
    "INTERNLM3": FamilyFacts({"no_bias": True}, mlp_bias=True),
    "LLAMA2": FamilyFacts({"qk_interleaved": True}, mlp_bias=True, architecture=None),
    "QWEN2": FamilyFacts(
        {"o_bias": False},
        qkv_bias=True,
        o_bias=False,
        sliding_window=True,
        layer_types=True,
    ),
    "QWEN3": FamilyFacts(
        {"no_bias": True, "qk_norm": True},
        qk_norm=True,
        sliding_window=True,
        layer_types=True,
    ),
    "MISTRAL": FamilyFacts(
        {"no_bias": True},
        qkv_bias=False,
        o_bias=False,
        sliding_window=True,
    ),
    "PHI3": FamilyFacts(
        {"no_bias": True},
        qkv_bias=False,
        o_bias=False,
        sliding_window=True,
    ),
    "SMOLLM3": FamilyFacts(
        {"no_bias": True},
        sliding_window=True,
        layer_types=True,
        mlp_bias=True,
        nope_interval=4,
    ),
    "BAICHUAN2": FamilyFacts(
        {"no_bias": True, "norm_head": True},
        qkv_bias=False,
        o_bias=False,
        grouped=False,
    ),
    "OLMO2": FamilyFacts(
        {"no_bias": True, "qk_norm": True},
        qk_norm=True,
        architecture={"norm_placement": "after", "qk_norm_over": "projection"},
    ),
    "GEMMA": FamilyFacts(
        {"no_bias": True, "tie_word_embeddings": True},
        qk_norm=False,
        architecture=_GEMMA,
    ),
    "GEMMA2": FamilyFacts(
        {
            "no_bias": True,
            "tie_word_embeddings": True,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        qk_norm=False,
        sliding_window=True,
        layer_types=True,
        architecture=_GEMMA | {"norm_placement": "both"},
        free=(
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
    ),
    "GEMMA3": FamilyFacts(
        {"no_bias": True, "tie_word_embeddings": True, "qk_norm": True},
        qk_norm=True,
        sliding_window=True,
        layer_types=True,
        architecture=_GEMMA | {"norm_placement": "both"},
        free=("query_pre_attn_scalar", "final_logit_softcapping", "local_rope_base"),
    ),
}


def architecture_of(family: str) -> dict[str, Any]:
    """Return the values of ``ARCHITECTURE_KEYS`` that a family fixes and that are not the schema's defaults."""
    facts = FAMILY_FACTS.get(family)
    return dict(facts.architecture or {}) if facts else {}
