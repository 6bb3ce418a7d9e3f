"""The interface that training and generation require of a model.

Shapes: T packed tokens, D model.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn

from evomesh.config.schema import RotaryType
from evomesh.layers.attention import AttentionFunction, SequenceBounds, attend
from evomesh.layers.init import InitialWeight
from evomesh.layers.loss import LossOutput
from evomesh.layers.rotary import RotaryEmbedding


class LanguageModel(nn.Module):
    """Base class of all models. A custom model need not inherit from it, as long as it has these methods."""

    def forward(
        self, x: Tensor, bounds: SequenceBounds, attend: AttentionFunction = attend
    ) -> Tensor:
        """Map token ids [T] int64 of one packed sequence to hidden states [T, D].

        Args:
            x: on a later pipeline stage, the previous stage's hidden states [T, D] instead.
            bounds: positions of the tokens and bounds of the segments.
            attend: the attention function, called with rotated q, k and v; generation adds a key/value cache.
        """
        raise NotImplementedError

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        grad_scale: float | Tensor = 1.0,
        label_smoothing: float = 0.0,
        z_loss_coeff: float = 0.0,
    ) -> LossOutput:
        """Sum the losses of ``hidden`` [T, D] over the targets in ``labels`` [T] int64; see ``layers/loss.py``.

        ``z_loss_coeff`` is given by keyword, and only where ``loss.z_loss_coeff`` is set: a custom model without it
        trains as long as the config does not ask for it.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [T, D] to logits [T, vocab_size] in at least float32."""
        raise NotImplementedError

    def initial(self, name: str) -> InitialWeight:
        """Return the initial distribution of a parameter by global name; optional, else the builder initializes it."""
        raise NotImplementedError


def short_length(model: nn.Module) -> int | None:
    """Return the length up to which a model of rope type longrope rotates by its short factors; None for other models.

    A sequence that grows beyond it is rotated by other angles as a whole, so that keys
    in a cache no longer fit: its tokens are read again, as transformers does.
    """
    scaling = getattr(getattr(model, "config", None), "rope_scaling", None)
    if scaling is None or scaling.type != "longrope":
        return None
    length: int | None = scaling.original_max_position_embeddings
    return length


def has_rotary_types(model: nn.Module) -> bool:
    """Return whether dynamic NTK can be switched: ``model.rotary`` is a ``RotaryEmbedding`` without another scaling.

    A custom model may use another position encoding.
    """
    rotary = getattr(model, "rotary", None)
    return isinstance(rotary, RotaryEmbedding) and rotary.scaling is None


def with_rotary_type(model: LanguageModel, rotary_type: RotaryType) -> LanguageModel:
    """Return a model with this rotary type that shares every parameter with ``model``.

    Args:
        model: one whose dynamic NTK can be switched (``has_rotary_types``); it is not changed.
    """
    rotary = model.rotary
    assert isinstance(rotary, RotaryEmbedding) and rotary.scaling is None
    other = copy.copy(model)
    other.rotary = replace(rotary, dynamic_ntk=rotary_type == "dynamic")
    return other
