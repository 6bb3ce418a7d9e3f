"""Rules of the keys that tell the newer architectures apart: which values a family has, and which exclude others."""

from __future__ import annotations

from collections.abc import Iterator

from evomesh.config.families import ARCHITECTURE_KEYS, FAMILY_FACTS
from evomesh.config.finding import ConfigFinding
from evomesh.config.model import ModelConfig


def architecture_findings(model: ModelConfig) -> Iterator[ConfigFinding]:
    """Yield each key that has another value than all models of the family have."""
    family = model.model_type
    facts = FAMILY_FACTS.get(family)
    yield from _contradictions(model)
    if facts is None or facts.architecture is None:
        return  # a custom model and InternEvo's families decide for themselves
    for key in ARCHITECTURE_KEYS:
        wanted = facts.architecture.get(key, ModelConfig.model_fields[key].default)
        value = getattr(model, key)
        if value == wanted or key in facts.free:
            continue
        having = [
            name for name, others in FAMILY_FACTS.items() if others.may_have(key, value)
        ]
        yield ConfigFinding(
            (f"model.{key}",),
            f"{key} is {value!r}, and {family} models have {key}={wanted!r}",
            fix=f"remove model.{key}, or take model_type {' or '.join(having)}",
            code="EVO-CONFIG-010",
        )


def _contradictions(model: ModelConfig) -> Iterator[ConfigFinding]:
    """Yield keys of which one leaves no meaning to another."""
    if model.norm_placement != "before" and model.apply_post_layer_norm:
        yield ConfigFinding(
            ("model.apply_post_layer_norm", "model.norm_placement"),
            f"norm_placement={model.norm_placement!r} together with apply_post_layer_norm, norm(x + f(x))",
            expected="one of them",
            fix="remove model.apply_post_layer_norm",
            code="EVO-CONFIG-007",
        )
    if model.add_unit_offset and model.norm_type != "rmsnorm":
        yield ConfigFinding(
            ("model.add_unit_offset", "model.norm_type"),
            f"add_unit_offset with norm_type={model.norm_type!r}",
            expected="norm_type='rmsnorm', whose weights alone can be offset",
            fix="remove model.add_unit_offset",
            code="EVO-CONFIG-007",
        )
    if model.gate_activation != "silu" and not model.use_swiglu:
        yield ConfigFinding(
            ("model.gate_activation", "model.use_swiglu"),
            "gate_activation with use_swiglu=False, whose network has no gate",
            expected="one of them",
            fix="remove model.use_swiglu",
            code="EVO-CONFIG-007",
        )
    if model.local_rope_base is not None and model.sliding_window is None:
        yield ConfigFinding(
            ("model.local_rope_base", "model.sliding_window"),
            "local_rope_base without sliding_window: no layer has a window",
            fix="set model.sliding_window and model.layer_types, or remove model.local_rope_base",
            code="EVO-CONFIG-007",
        )
