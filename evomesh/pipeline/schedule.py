"""In which order micro-batches pass through the stages: one stage, or torch.distributed.pipelining over several.

Shapes: M micro-batches, T packed tokens, S = T / tp, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from evomesh.data.batch import Batch
from evomesh.layers.documents import Documents
from evomesh.layers.loss import LossOutput
from evomesh.parallel.collectives import gather, split
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import TensorMode
from evomesh.pipeline.stages import stages_of_rank

OnOutput = Callable[[int, LossOutput], None]  # index of the micro-batch, its loss


class Model(Protocol):
    """A whole model, or the part of it that one stage holds."""

    def __call__(self, x: Tensor, docs: Documents) -> Tensor: ...

    def loss(
        self, hidden: Tensor, labels: Tensor, grad_scale: float | Tensor = 1.0, label_smoothing: float = 0.0
    ) -> LossOutput: ...


class Schedule(Protocol):
    """Runs all micro-batches of a batch; ``on_output`` is called on the ranks of the last stage, in order."""

    def train(self, batch: Batch, scales: Sequence[float], smoothing: float, on_output: OnOutput) -> None:
        """Forward and backward: adds the gradient of sum over m of ``scales[m]`` times the summed loss of m."""

    def evaluate(self, batch: Batch, on_output: OnOutput) -> None:
        """Forward alone, without gradient."""


def documents_of(batch: Batch, index: int) -> Documents:
    return Documents(batch.position_ids[index], batch.cu_seqlens[index], batch.max_seqlen)


class OneStage:
    """The whole model on this rank: forward and backward of one micro-batch after the other."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def train(self, batch: Batch, scales: Sequence[float], smoothing: float, on_output: OnOutput) -> None:
        for index, scale in enumerate(scales):
            output = self._loss(batch, index, scale, smoothing)
            torch.autograd.backward(output.scaled_sum)
            on_output(index, output)

    @torch.no_grad()
    def evaluate(self, batch: Batch, on_output: OnOutput) -> None:
        for index in range(len(batch.input_ids)):
            on_output(index, self._loss(batch, index, 1.0, 0.0))

    def _loss(self, batch: Batch, index: int, scale: float, smoothing: float) -> LossOutput:
        hidden = self.model(batch.input_ids[index], documents_of(batch, index))
        return self.model.loss(hidden, batch.labels[index], scale, smoothing)


@dataclass
class _Work:
    """What the stages of this rank read while a schedule runs."""

    batch: Batch
    scales: Sequence[float]
    smoothing: float
    on_output: OnOutput


class _Stage(nn.Module):
    """A stage as the pipeline calls it, with hidden states alone.

    Every schedule runs the micro-batches of a stage in ascending order, so that a stage can count them, and look up
    ids, ragged documents and labels: every rank has the batch anyway, and torch's splitting never meets them. It is
    also the plain module round an FSDP root: handed an FSDP root itself, PipelineStage would keep the weights whole
    until the last micro-batch.
    """

    def __init__(self, model: nn.Module, first: bool, last: bool, pieces: Axis) -> None:
        super().__init__()
        self.model, self.first, self.last, self.pieces = model, first, last, pieces
        self.work: _Work | None = None
        self.done = 0

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [S, D] (mtp: the tp rank's columns of them) -> the same, or the scaled loss, a scalar.

        The first stage is given the number of the micro-batch, [1, 1] int64.
        """
        assert self.work is not None
        micro_batch, batch = self.done, self.work.batch
        self.done += 1
        # In mtp all tp ranks hold the same hidden states: each sends its columns, and the receivers gather them.
        x = batch.input_ids[micro_batch] if self.first else gather(x, self.pieces, dim=1)
        hidden = self.model(x, documents_of(batch, micro_batch))
        if not self.last:
            return split(hidden, self.pieces, dim=1)
        model: Any = self.model
        scale, smoothing = self.work.scales[micro_batch], self.work.smoothing
        output = model.loss(hidden, batch.labels[micro_batch], scale, smoothing)
        self.work.on_output(micro_batch, output)
        loss: Tensor = output.scaled_sum
        return loss


class Pipeline:
    """Several stages, this rank's ``models`` among them.

    Args:
        models: this rank's chunks, in the order of ``stages_of_rank``.
        schedule: "1f1b", "interleaved" or "zbv".
        hidden_size: D.
        dtype: of the hidden states between stages.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        grid: Grid,
        mode: TensorMode,
        *,
        schedule: str,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        pp, tp = grid.pp, grid.tp
        self._kind, self._group, self._device = schedule, pp.group, device
        self._stages = stages_of_rank(pp.rank, pp.size, len(models), schedule)
        self._count = pp.size * len(models)
        pieces = Axis("tp") if mode.sequence else tp
        self._modules = [
            _Stage(model, stage == 0, stage == self._count - 1, pieces)
            for model, stage in zip(models, self._stages, strict=True)
        ]
        self._cut = (tp.size, 1) if mode.sequence else (1, tp.size)  # of hidden states [T, D] on their way
        self._hidden_size, self._dtype = hidden_size, dtype
        self._made: dict[tuple[int, int, bool], Any] = {}

    def train(self, batch: Batch, scales: Sequence[float], smoothing: float, on_output: OnOutput) -> None:
        self._run(_Work(batch, scales, smoothing, on_output), training=True)

    @torch.no_grad()
    def evaluate(self, batch: Batch, on_output: OnOutput) -> None:
        self._run(_Work(batch, [1.0] * len(batch.input_ids), 0.0, on_output), training=False)

    def _run(self, work: _Work, training: bool) -> None:
        count, tokens = work.batch.input_ids.shape
        key = count, tokens, training  # a schedule is made for one number of micro-batches, and its stages with it
        if key not in self._made:
            self._made[key] = self._make(*key)
        schedule = self._made[key]
        index = torch.arange(count)[:, None]
        for module in self._modules:
            module.work, module.done = work, 0
        arguments = (index,) if 0 in self._stages else ()
        target = work.batch.labels if self._count - 1 in self._stages else None
        try:
            (schedule.step if training else schedule.eval)(*arguments, target=target, return_outputs=False)
        finally:
            for module in self._modules:
                module.work = None

    def _make(self, count: int, tokens: int, training: bool) -> Any:
        shape = tokens // self._cut[0], self._hidden_size // self._cut[1]
        between = torch.empty(shape, dtype=self._dtype, device="meta")
        loss = torch.empty((), dtype=torch.promote_types(self._dtype, torch.float32), device="meta")
        index = torch.empty(1, 1, dtype=torch.long, device="meta")
        stages: Any = [  # invariant in a private base class
            PipelineStage(
                module,
                stage,
                self._count,
                self._device,
                input_args=index if module.first else between.detach().requires_grad_(training),
                output_args=(loss if module.last else between).detach().requires_grad_(training),
                group=self._group,
            )
            for module, stage in zip(self._modules, self._stages, strict=True)
        ]
        # Sums, never means: the division by the number of targets is in the scales.
        options: dict[str, Any] = {"n_microbatches": count, "loss_fn": _take_loss, "scale_grads": False}
        if self._kind == "zbv":
            return ScheduleZBVZeroBubble(stages, **options)
        if self._kind == "interleaved":
            return ScheduleInterleaved1F1B(stages, **options)
        # With fewer micro-batches than stages 1F1B has no steady phase: all forwards, then all backwards.
        return (Schedule1F1B if count >= self._count else ScheduleGPipe)(stages[0], **options)


def _take_loss(output: Tensor, target: Tensor) -> Tensor:
    """The last stage has made the loss already, because what it needs is not in ``target`` alone."""
    del target
    return output.clone()
