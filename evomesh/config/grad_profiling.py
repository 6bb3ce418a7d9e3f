"""``grad_profiling``: figures of single layers' gradients, and the names that layers have in it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import Field

from evomesh.config.families import FAMILY_FACTS
from evomesh.config.finding import ConfigFinding
from evomesh.config.model import ModelConfig
from evomesh.config.section import Section

# InternEvo names a layer by its class, here by where it is in the model.
CLASS_NAMES = {
    "Embedding1D": "embedding",
    "ScaleColumnParallelLinear": "head",
    "RMSNorm": "norm",
    "LayerNorm": "norm",
}
# The class of a block and its number, as in PackedFlashInternLm1DBlock7.
BLOCK_CLASS = re.compile(r"\w*Block(\d+)")


class GradProfilingConfig(Section):
    grad_norm_profiling: bool = Field(
        False,
        description="Write the gradient norm of each layer and of each parameter.",
    )
    zero_grad_profiling: bool = Field(
        False,
        description="Write how many elements of each layer's and each parameter's gradient are zero.",
    )
    vocab_grad_norm_profiling: bool = Field(
        False,
        description="Write the gradient norm of each row of the output head into grad_norm/ of the run folder.",
    )
    layers: tuple[str, ...] | None = Field(
        None,
        description="Layers to write: embedding, layers.0, norm, head, or InternEvo's class names; None: all.",
    )
    interval_steps: int = Field(
        1, ge=1, description="Steps from one measurement to the next."
    )

    @property
    def writes_layers(self) -> bool:
        """Return whether figures of layers are asked for."""
        return self.grad_norm_profiling or self.zero_grad_profiling

    @property
    def is_on(self) -> bool:
        """Return whether anything is asked for."""
        return self.writes_layers or self.vocab_grad_norm_profiling

    def is_due(self, step: int) -> bool:
        """Return whether the gradient of a step, counted from 0, is measured."""
        return self.is_on and step % self.interval_steps == 0


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter: ``layers.3`` of ``layers.3.mlp.w1.weight``, ``norm`` of ``norm.weight``."""
    first, *others = parameter.split(".")
    is_list = len(others) > 1 and others[0].isdigit()
    return f"{first}.{others[0]}" if is_list else first


def chosen_layer(written: str, tied: bool) -> str:
    """Return the layer that an entry of ``grad_profiling.layers`` means.

    Args:
        tied: the output head is the embedding, which has the gradient of both.
    """
    block = BLOCK_CLASS.fullmatch(written)
    name = CLASS_NAMES.get(written, written)
    if block is not None:
        name = f"layers.{block[1]}"
    return "embedding" if tied and name == "head" else name


def profiling_findings(
    config: GradProfilingConfig, model: ModelConfig
) -> Iterator[ConfigFinding]:
    """Yield the chosen layers that a model does not have; those of a custom model are checked when it is built."""
    is_custom = model.model_type not in FAMILY_FACTS
    if is_custom or not config.writes_layers:
        return
    blocks = {f"layers.{index}" for index in range(model.num_layers)}
    known = {"embedding", "norm", "head"} | blocks
    for written in config.layers or ():
        if chosen_layer(written, model.tie_word_embeddings) not in known:
            yield ConfigFinding(
                ("grad_profiling.layers",),
                f"the model has no layer {written!r}",
                expected=f"embedding, layers.0 to layers.{model.num_layers - 1}, norm, head, "
                f"or InternEvo's {', '.join(CLASS_NAMES)}",
                fix="remove it; without grad_profiling.layers all layers are written",
                code="EVO-MODEL-006",
            )
