"""In which order micro-batches pass through the stages: one stage, or torch.distributed.pipelining over several.

Shapes: M micro-batches, T packed tokens, S = T / tp, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evomesh.data.batch import Batch
from evomesh.errors import UserError
from evomesh.layers.loss import LossOutput
from evomesh.layers.sequence_bounds import SequenceBounds, micro_batch_bounds
from evomesh.parallel.collectives import gather_from_axis, launch_send, receive, shard_to_axis
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import TensorMode
from evomesh.pipeline.stages import stages_of_rank

ZBV_SINCE = "2.13"  # the first torch that it was seen to work with
OnOutput = Callable[[int, LossOutput], None]  # index of the micro-batch, its loss


class StageModel(Protocol):
    """A whole model, or the part of it that one stage holds."""

    def __call__(self, x: Tensor, docs: SequenceBounds) -> Tensor: ...

    def loss(
        self, hidden: Tensor, labels: Tensor, grad_scale: float | Tensor = 1.0, label_smoothing: float = 0.0
    ) -> LossOutput: ...


class Schedule(Protocol):
    """Runs all micro-batches of a batch; ``on_output`` is called on the ranks of the last stage, in order."""

    def train(self, batch: Batch, scales: Sequence[float], smoothing: float, on_output: OnOutput) -> None:
        """Forward and backward: adds the gradient of sum over m of ``scales[m]`` times the summed loss of m."""

    def evaluate(self, batch: Batch, on_output: OnOutput) -> None:
        """Forward alone, without gradient."""


class SingleStageSchedule:
    """The whole model on this rank: forward and backward of one micro-batch after the other."""

    def __init__(self, model: StageModel) -> None:
        self.model = model

    def train(self, batch: Batch, scales: Sequence[float], smoothing: float, on_output: OnOutput) -> None:
        for index, scale in enumerate(scales):
            output = self._loss(batch, index, scale, smoothing)
            torch.autograd.backward(output.scaled_sum)
            on_output(index, output)

    @torch.no_grad()
    def evaluate(self, batch: Batch, on_output: OnOutput) -> None:
        for index in range(len(batch.tokens)):
            on_output(index, self._loss(batch, index, 1.0, 0.0))

    def _loss(self, batch: Batch, index: int, scale: float, smoothing: float) -> LossOutput:
        hidden = self.model(batch.tokens[index], micro_batch_bounds(batch, index))
        return self.model.loss(hidden, batch.labels[index], scale, smoothing)


@dataclass
class _ScheduleInputs:
    """What the stages of this rank read while a schedule runs."""

    batch: Batch
    scales: Sequence[float]
    smoothing: float
    on_output: OnOutput


class _StageModule(nn.Module):
    """A stage as the pipeline calls it, with hidden states alone.

    Every schedule runs the micro-batches of a stage in ascending order, so that a stage can count them, and look up
    ids, ragged documents and labels: every rank has the batch anyway, and torch's splitting never meets them. It is
    also the plain module round an FSDP root: handed an FSDP root itself, PipelineStage would keep the weights whole
    until the last micro-batch.
    """

    def __init__(self, model: nn.Module, first: bool, last: bool, pieces: Axis) -> None:
        super().__init__()
        self.model, self.first, self.last, self.pieces = model, first, last, pieces
        self.work: _ScheduleInputs | None = None
        self.done = 0

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [S, D] (mtp: the tp rank's columns of them) -> the same, or the scaled loss, a scalar.

        The first stage is given the number of the micro-batch, [1, 1] int64.
        """
        assert self.work is not None
        micro_batch, batch = self.done, self.work.batch
        self.done += 1
        # In mtp all tp ranks hold the same hidden states: each sends its columns, and the receivers gather them.
        x = batch.tokens[micro_batch] if self.first else gather_from_axis(x, self.pieces, dim=1)
        hidden = self.model(x, micro_batch_bounds(batch, micro_batch))
        if not self.last:
            return shard_to_axis(hidden, self.pieces, dim=1)
        model: Any = self.model
        scale, smoothing = self.work.scales[micro_batch], self.work.smoothing
        output = model.loss(hidden, batch.labels[micro_batch], scale, smoothing)
        self.work.on_output(micro_batch, output)
        loss: Tensor = output.scaled_sum
        return loss


class PipelineSchedule:
    """Several stages, this rank's ``models`` among them.

    Args:
        models: this rank's chunks, in the order of ``stages_of_rank``.
        schedule: "1f1b", "interleaved" or "zbv".
        hidden_size: D.
        dtype: of the hidden states between stages.
    Raises:
        UserError: zbv with a torch that cannot do it.
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
        if schedule == "zbv":
            refuse_zbv(torch.__version__)
        pp, tp = grid.pp, grid.tp
        self._kind, self._pp, self._device = schedule, pp, device
        self._stages = stages_of_rank(pp.rank, pp.size, len(models), schedule)
        self._count = pp.size * len(models)
        pieces = Axis("tp") if mode.sequence_parallel else tp
        self._modules = [
            _StageModule(model, stage == 0, stage == self._count - 1, pieces)
            for model, stage in zip(models, self._stages, strict=True)
        ]
        self._cut = (
            (tp.size, 1) if mode.sequence_parallel else (1, tp.size)
        )  # of hidden states [T, D] on their way
        self._hidden_size, self._dtype = hidden_size, dtype
        self._made: dict[tuple[int, int], Any] = {}

    def train(self, batch: Batch, scales: Sequence[float], smoothing: float, on_output: OnOutput) -> None:
        count, tokens = batch.tokens.shape
        if (count, tokens) not in self._made:  # a schedule is made for one number of micro-batches
            self._made[count, tokens] = self._make(count, tokens)
        arguments = (torch.arange(count)[:, None],) if 0 in self._stages else ()
        target = batch.labels if self._count - 1 in self._stages else None
        with self._reading(_ScheduleInputs(batch, scales, smoothing, on_output)):
            self._made[count, tokens].step(*arguments, target=target, return_outputs=False)

    @torch.no_grad()
    def evaluate(self, batch: Batch, on_output: OnOutput) -> None:
        """Every stage passes all micro-batches on, then the rank's next stage: torch's own eval knows no V."""
        count, tokens = batch.tokens.shape
        here: list[Tensor] = []  # from the stage before, where that is on this rank
        with self._reading(_ScheduleInputs(batch, [1.0] * count, 0.0, on_output)):
            for module, stage in zip(self._modules, self._stages, strict=True):
                outputs = []
                for index in range(count):
                    output = module(here[index] if here else self._from(stage - 1, index, tokens))
                    outputs.append((output, None if module.last else self._to(stage + 1, output)))
                for _, work in outputs:
                    if work is not None:
                        work.wait()
                here = [output for output, _ in outputs] if stage + 1 in self._stages else []

    def rehearse(self, batch: Batch, scales: Sequence[float], smoothing: float, on_output: OnOutput) -> None:
        """Forward and backward of this rank's stages with all they would send, in an order that suits no other rank.

        For a trace on a fake process group, on which torch's schedules cannot agree about shapes.
        """
        tokens = batch.tokens.shape[1]
        with self._reading(_ScheduleInputs(batch, scales, smoothing, on_output)):
            for module, stage in zip(self._modules, self._stages, strict=True):
                for index in range(len(scales)):
                    x = self._from(stage - 1, index, tokens)
                    output = module(x if module.first else x.requires_grad_())
                    if module.last:
                        torch.autograd.backward(output)
                    else:
                        self._to(stage + 1, output)
                        torch.autograd.backward(output, self._from(stage + 1, index, tokens))
                    if not module.first:
                        assert x.grad is not None
                        self._to(stage - 1, x.grad)

    def _from(self, stage: int, index: int, tokens: int) -> Tensor:
        if stage < 0:
            return torch.tensor([[index]])
        buffer = torch.empty(self._between(tokens), dtype=self._dtype, device=self._device)
        if self._rank_of(stage) == self._pp.rank:  # in a rehearsal, at the turn of a V
            return buffer
        return receive(buffer, self._pp, self._rank_of(stage))

    def _to(self, stage: int, output: Tensor) -> Any:
        rank = self._rank_of(stage)
        return None if rank == self._pp.rank else launch_send(output.contiguous(), self._pp, rank)

    def _rank_of(self, stage: int) -> int:
        round_, position = divmod(stage, self._pp.size)
        return self._pp.size - 1 - position if self._kind == "zbv" and round_ else position

    def _between(self, tokens: int) -> tuple[int, int]:
        """Shape of the hidden states on their way between ranks."""
        return tokens // self._cut[0], self._hidden_size // self._cut[1]

    @contextmanager
    def _reading(self, work: _ScheduleInputs) -> Iterator[None]:
        for module in self._modules:
            module.work, module.done = work, 0
        try:
            yield
        finally:
            for module in self._modules:
                module.work = None

    def _make(self, count: int, tokens: int) -> Any:
        from torch.distributed import pipelining  # with FSDP and DTensor behind it 0.7 s, for pipelines only

        from evomesh.pipeline.split import ZeroBubbleStage

        between = torch.empty(self._between(tokens), dtype=self._dtype, device="meta")
        loss = torch.empty((), dtype=torch.promote_types(self._dtype, torch.float32), device="meta")
        index = torch.empty(1, 1, dtype=torch.long, device="meta")
        stages: Any = [  # invariant in a private base class
            (ZeroBubbleStage if self._kind == "zbv" else pipelining.PipelineStage)(
                module,
                stage,
                self._count,
                self._device,
                input_args=index if module.first else between.detach().requires_grad_(),
                output_args=(loss if module.last else between).detach().requires_grad_(),
                group=self._pp.group,
            )
            for module, stage in zip(self._modules, self._stages, strict=True)
        ]
        # Sums, never means: the division by the number of targets is in the scales.
        options: dict[str, Any] = {"n_microbatches": count, "loss_fn": _take_loss, "scale_grads": False}
        if self._kind == "zbv":
            return pipelining.ScheduleZBVZeroBubble(stages, **options)
        if self._kind == "interleaved":
            return pipelining.ScheduleInterleaved1F1B(stages, **options)
        # With fewer micro-batches than stages 1F1B has no steady phase: all forwards, then all backwards.
        kind = pipelining.Schedule1F1B if count >= self._count else pipelining.ScheduleGPipe
        return kind(stages[0], **options)


def refuse_zbv(version: str) -> None:
    """
    Args:
        version: a ``TorchVersion``, which compares by its numbers.
    Raises:
        UserError: its backward that makes gradients of inputs first, as in 2.11, stops at autograd functions written in
            Python, such as our losses and collectives.
    """
    if version < ZBV_SINCE:
        raise UserError(
            f"torch {version} cannot split the backward of this model in two",
            where="parallel.pipeline.schedule",
            expected=f"torch {ZBV_SINCE} or later for zbv",
            fix='install it, or take schedule="interleaved"',
        )


def _take_loss(output: Tensor, target: Tensor) -> Tensor:
    """The last stage has made the loss already, because what it needs is not in ``target`` alone."""
    del target
    return output.clone()
