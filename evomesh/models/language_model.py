"""What training and generation need of a model.

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
    """Base of all models. A user's own class need not inherit from it, as long as it has these methods."""

    def forward(self, x: Tensor, bounds: SequenceBounds, attend: AttentionFunction = attend) -> Tensor:
        """Token ids [T] int64 of one packed sequence -> hidden states [T, D].

        Args:
            x: on a later pipeline stage, the previous stage's hidden states [T, D] instead.
            bounds: positions and bounds of the packed documents.
            attend: attention itself, given rotated q, k and v; generation passes one that keeps keys and values.
        """
        raise NotImplementedError

    def loss(
        self, hidden: Tensor, labels: Tensor, grad_scale: float | Tensor = 1.0, label_smoothing: float = 0.0
    ) -> LossOutput:
        """Summed loss of ``hidden`` [T, D] over the targets in ``labels`` [T] int64; see ``layers/loss.py``."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, vocab_size] in at least float32."""
        raise NotImplementedError

    def initial(self, name: str) -> InitialWeight:
        """What the parameter of this global name starts as. Without this method, it stays as the builder made it."""
        raise NotImplementedError


def has_rotary_embedding(model: nn.Module) -> bool:
    """Return whether ``model.rotary`` is a ``RotaryEmbedding``; a custom model may rotate in another way, or not."""
    return isinstance(getattr(model, "rotary", None), RotaryEmbedding)


def with_rotary_type(model: LanguageModel, rotary_type: RotaryType) -> LanguageModel:
    """Return a model that rotates positions in this way and shares every parameter with ``model``.

    Args:
        model: one with a rotary embedding (``has_rotary_embedding``); it stays as it is.
    """
    rotary = model.rotary
    assert isinstance(rotary, RotaryEmbedding)
    other = copy.copy(model)
    other.rotary = replace(rotary, dynamic_ntk=rotary_type == "dynamic")
    return other
