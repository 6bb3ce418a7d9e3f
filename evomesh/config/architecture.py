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
    if model.norm_placement != "before" and model.apply_post_layer_norm:
        yield ConfigFinding(
            ("model.apply_post_layer_norm", "model.norm_placement"),
            f"norm_placement={model.norm_placement!r} together with apply_post_layer_norm, norm(x + f(x))",
            expected="one of them",
            fix="remove model.apply_post_layer_norm",
        )
    if facts is None or facts.architecture is None:
        return  # a custom model and InternEvo's families decide for themselves
    for key in ARCHITECTURE_KEYS:
        wanted = facts.architecture.get(key, ModelConfig.model_fields[key].default)
        value = getattr(model, key)
        if value == wanted:
            continue
        having = [
            name
            for name, others in FAMILY_FACTS.items()
            if others.architecture is None or others.architecture.get(key) == value
        ]
        yield ConfigFinding(
            (f"model.{key}",),
            f"{key} is {value!r}, and {family} models have {key}={wanted!r}",
            fix=f"remove model.{key}, or take model_type {' or '.join(having)}",
        )
