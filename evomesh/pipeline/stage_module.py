"""A pipeline stage as torch's schedules call it, and what it is given for each micro-batch.

Shapes: T packed tokens, S = T / tp, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from evomesh.data.batch import Batch
from evomesh.layers.block_softmax import LossTerms
from evomesh.layers.loss import LossOutput
from evomesh.layers.sequence_bounds import SequenceBounds, micro_batch_bounds
from evomesh.parallel.collectives import gather_from_axis, shard_to_axis
from evomesh.parallel.grid import Axis

# Factor of a micro-batch's summed loss; a scalar tensor keeps it on the device.
LossScale = float | Tensor
OnOutput = Callable[[int, LossOutput], None]  # index of the micro-batch, its loss
# Index of the micro-batch, the model of the last stage, its hidden states.
OnHidden = Callable[[int, Any, Tensor], None]


class StageModel(Protocol):
    """A whole model, or the part of it that one stage holds."""

    def __call__(self, x: Tensor, docs: SequenceBounds) -> Tensor: ...

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        grad_scale: float | Tensor = 1.0,
        label_smoothing: float = 0.0,
        z_loss_coeff: float = 0.0,
    ) -> LossOutput: ...


def model_loss(
    model: StageModel,
    hidden: Tensor,
    labels: Tensor,
    scale: LossScale,
    terms: LossTerms,
) -> LossOutput:
    """Call ``model.loss``, whose ``z_loss_coeff`` a custom model may lack (the build refuses that)."""
    z_loss = {}
    if terms.z_loss_coeff:
        z_loss["z_loss_coeff"] = terms.z_loss_coeff
    return model.loss(hidden, labels, scale, terms.label_smoothing, **z_loss)


@dataclass
class ScheduleInputs:
    """Inputs that the stages of this rank read while a schedule runs.

    Attributes:
        on_hidden: gets the hidden states of the last stage; there is then no loss.
    """

    batch: Batch
    scales: Sequence[LossScale]
    terms: LossTerms
    on_output: OnOutput
    on_hidden: OnHidden | None = None


class StageModule(nn.Module):
    """A stage as torch's pipeline calls it: hidden states in, hidden states (or the loss) out.

    Every schedule runs the micro-batches of a stage in ascending order. So a stage
    counts them and looks up token ids, sequence bounds and labels in the batch, which
    every rank has anyway; torch's splitting never sees these.

    It is also a plain module around an FSDP root: PipelineStage would keep the weights
    of an FSDP root unsharded until the last micro-batch.
    """

    def __init__(
        self, model: nn.Module, first: bool, last: bool, column_axis: Axis
    ) -> None:
        super().__init__()
        self.model = model
        self.first = first
        self.last = last
        self.column_axis = column_axis
        self.inputs: ScheduleInputs | None = None
        self.num_done = 0

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states [S, D] (mtp: this tp rank's columns of them) to the same, or to the scaled loss, a scalar.

        The first stage is given the number of the micro-batch, [1, 1] int64.
        """
        assert self.inputs is not None
        batch = self.inputs.batch
        micro_batch = self.num_done
        self.num_done += 1
        # In mtp all tp ranks hold the same hidden states: each sends its columns, and
        # the receivers gather them.
        if self.first:
            x = batch.tokens[micro_batch]
        else:
            x = gather_from_axis(x, self.column_axis, dim=1)
        hidden: Tensor = self.model(x, micro_batch_bounds(batch, micro_batch))
        if not self.last:
            return shard_to_axis(hidden, self.column_axis, dim=1)
        model: Any = self.model
        if self.inputs.on_hidden is not None:
            self.inputs.on_hidden(micro_batch, model, hidden)
            return hidden
        labels = batch.labels[micro_batch]
        scale = self.inputs.scales[micro_batch]
        output = model_loss(model, hidden, labels, scale, self.inputs.terms)
        self.inputs.on_output(micro_batch, output)
        loss: Tensor = output.scaled_sum
        return loss
