"""A model whose layers are spread over the ranks of a pipeline, to be called like a whole one.

Shapes: T packed tokens of one call, D model, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evomesh.config.schema import ModelConfig
from evomesh.layers.attention import AttentionFunction, SequenceBounds, attend
from evomesh.layers.dtype import parameter_dtype, promote
from evomesh.models.language_model import LanguageModel
from evomesh.parallel.collectives import broadcast_from, launch_send, receive
from evomesh.parallel.grid import Axis


class StagedModel(LanguageModel):
    """Every rank of ``axis`` calls it with the same tokens and gets the same logits, so all choose the same next ones.

    Args:
        stage: the layers of this rank, stages in rank order; tensor mode mtp, in which all tensor ranks hold the same
            hidden states.
    """

    def __init__(self, stage: LanguageModel, axis: Axis, config: ModelConfig) -> None:
        super().__init__()
        self.stage, self.axis, self.config = stage, axis, config
        self.dtype = parameter_dtype(config.dtype)

    @property
    def last(self) -> bool:
        return self.axis.rank == self.axis.size - 1

    def forward(self, x: Tensor, docs: SequenceBounds, attend: AttentionFunction = attend) -> Tensor:
        """[T] ids -> [T, D]: final hidden states on the last rank, this stage's own on the others."""
        if self.axis.rank > 0:
            dtype = promote(self.dtype) if self.config.residual_in_fp32 else self.dtype
            room = torch.empty(len(x), self.config.hidden_size, dtype=dtype, device=x.device)
            x = receive(room, self.axis, self.axis.rank - 1)
        hidden: Tensor = self.stage(x, docs, attend)
        if (
            not self.last
            and (work := launch_send(hidden.contiguous(), self.axis, self.axis.rank + 1)) is not None
        ):
            work.wait()
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, V] of the last rank, on every rank."""
        if self.last:
            logits = self.stage.logits(hidden).contiguous()
        else:
            shape = (len(hidden), self.config.vocab_size)
            logits = torch.empty(shape, dtype=promote(self.dtype), device=hidden.device)
        broadcast_from(logits, self.axis, source=self.axis.size - 1)
        return logits
