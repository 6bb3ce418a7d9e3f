"""Rules of ``model.mup``: which models have widths that it can scale."""

from __future__ import annotations

from collections.abc import Iterator

from evomesh.config.families import FAMILY_FACTS
from evomesh.config.finding import ConfigFinding
from evomesh.config.model import ModelConfig

OFF = "remove model.mup"
# Key, value, and what it does to a factor of muP.
EXCLUDED = (
    (
        "scale_embeddings",
        True,
        "multiplies embeddings by sqrt(hidden_size), which grows with the width",
    ),
    ("norm_head", True, "takes the head's scale out of the logits"),
    (
        "apply_post_layer_norm",
        True,
        "leaves no norm before the head to carry the factor of the logits",
    ),
)


def mup_findings(model: ModelConfig) -> Iterator[ConfigFinding]:
    """Yield what muP has no rule for."""
    mup = model.mup
    if not mup.is_on:
        if mup.base_head_dim is not None:
            yield ConfigFinding(
                ("model.mup.base_head_dim",),
                "base_head_dim without base_hidden_size: muP is off",
                fix="set model.mup.base_hidden_size too, or remove it",
                code="EVO-CONFIG-007",
            )
        return
    base = "model.mup.base_hidden_size"
    if model.model_type not in FAMILY_FACTS:
        yield ConfigFinding(
            (base,),
            f"{model.model_type} is a custom model, whose widths evomesh does not know",
            expected="one of the built-in families",
            fix=f"{OFF}, and set learning rates by adam.groups",
            code="EVO-CONFIG-007",
        )
    for key, value, words in EXCLUDED:
        if getattr(model, key) == value:
            yield ConfigFinding(
                (base, f"model.{key}"), f"{key} {words}", fix=OFF, code="EVO-CONFIG-007"
            )
    if model.query_pre_attn_scalar is not None:
        yield ConfigFinding(
            (base, "model.query_pre_attn_scalar"),
            "query_pre_attn_scalar and muP both set the scale of attention scores",
            expected="one of them",
            fix="remove model.query_pre_attn_scalar",
            code="EVO-CONFIG-007",
        )
