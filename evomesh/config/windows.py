"""Rules of what only some families have: windows, layers of several kinds, feed-forward biases."""

from __future__ import annotations

from collections.abc import Iterator

from evomesh.config.families import FAMILY_FACTS
from evomesh.config.finding import ConfigFinding
from evomesh.config.model import ModelConfig


def window_findings(model: ModelConfig) -> Iterator[ConfigFinding]:
    """Yield what a model section says and its family does not have, and windows that its layers contradict."""
    yield from _family_findings(model)
    yield from _nope_findings(model)
    types = model.layer_types
    if types is None:
        return
    if len(types) != model.num_layers:
        yield ConfigFinding(
            ("model.layer_types", "model.num_layers"),
            f"{len(types)} layer types for {model.num_layers} layers",
            expected="one for each layer",
            code="EVO-CONFIG-007",
        )
    if model.sliding_window is None:
        yield ConfigFinding(
            ("model.layer_types", "model.sliding_window"),
            "layer_types without sliding_window: no layer has a window",
            fix="set model.sliding_window, or remove model.layer_types",
            code="EVO-CONFIG-007",
        )


def _nope_findings(model: ModelConfig) -> Iterator[ConfigFinding]:
    beyond = [
        layer for layer in model.nope_layers if layer not in range(model.num_layers)
    ]
    if beyond:
        yield ConfigFinding(
            ("model.nope_layers", "model.num_layers"),
            f"nope_layers has {', '.join(map(str, beyond))}, and there are {model.num_layers} layers",
            expected=f"indices from 0 to {model.num_layers - 1}",
            code="EVO-CONFIG-007",
        )


def _family_findings(model: ModelConfig) -> Iterator[ConfigFinding]:
    facts = FAMILY_FACTS.get(model.model_type)
    if facts is None:  # a custom model decides for itself
        return
    may_have = {
        "sliding_window": "a window",
        "layer_types": "layers of two kinds",
        "mlp_bias": "biases in their feed-forward networks",
        "nope_layers": "layers without rotary positions",
    }
    for key, described in may_have.items():
        if getattr(model, key) in (None, False, ()) or getattr(facts, key):
            continue
        families = [name for name, has in FAMILY_FACTS.items() if getattr(has, key)]
        yield ConfigFinding(
            (f"model.{key}",),
            f"{model.model_type} models do not have {described}",
            fix=f"remove model.{key}, or take model_type {' or '.join(families)}",
            code="EVO-CONFIG-010",
        )
