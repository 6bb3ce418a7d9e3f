"""A model whose layers are distributed over the stages of a pipeline, called like a model in one piece.

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
    """A pipelined model: every rank of ``axis`` passes the same tokens, gets the same logits, chooses the same token.

    Args:
        stage: the layers of this rank, stages in rank order; in tensor mode mtp, where all tensor ranks hold the same
            hidden states.
    """

    def __init__(self, stage: LanguageModel, axis: Axis, config: ModelConfig) -> None:
        super().__init__()
        self.stage, self.axis, self.config = stage, axis, config
        self.dtype = parameter_dtype(config.dtype)

    @property
    def is_last(self) -> bool:
        return self.axis.rank == self.axis.size - 1

    def forward(
        self, x: Tensor, docs: SequenceBounds, attend: AttentionFunction = attend
    ) -> Tensor:
        """Return hidden states [T, D] for ids [T]: the final ones on the last rank, this stage's output on others."""
        rank = self.axis.rank
        if rank > 0:
            x = receive(self._buffer(x), self.axis, rank - 1)
        hidden: Tensor = self.stage(x, docs, attend)
        if not self.is_last:
            sent = hidden.contiguous()
            pending = launch_send(sent, self.axis, rank + 1)
            if pending is not None:
                pending.wait()
        return hidden

    def _buffer(self, ids: Tensor) -> Tensor:
        """Return room for the hidden states [T, D] of ids [T], as the stage before sends them."""
        dtype = self.dtype
        if self.config.residual_in_fp32:
            dtype = promote(dtype)
        shape = (len(ids), self.config.hidden_size)
        return torch.empty(shape, dtype=dtype, device=ids.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the last rank's logits [T, V] on every rank."""
        if self.is_last:
            logits = self.stage.logits(hidden).contiguous()
        else:
            shape = (len(hidden), self.config.vocab_size)
            logits = torch.empty(
                shape,
                dtype=promote(self.dtype),
                device=hidden.device,
            )
        last_rank = self.axis.size - 1
        broadcast_from(logits, self.axis, source=last_rank)
        return logits
