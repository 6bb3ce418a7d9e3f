"""Schedules: the order in which micro-batches run, on one stage or by torch.distributed.pipelining over several.

Shapes: M micro-batches, T packed tokens, S = T / tp, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evomesh.data.batch import Batch
from evomesh.errors import UserError
from evomesh.layers.block_softmax import PLAIN, LossTerms
from evomesh.layers.loss import LossOutput
from evomesh.layers.sequence_bounds import micro_batch_bounds
from evomesh.parallel.collectives import launch_send, receive
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import TensorMode
from evomesh.parallel.recording import TransferRecord
from evomesh.pipeline.evaluation_order import StageVisit, evaluation_slots, first_inputs
from evomesh.pipeline.stage_module import (
    LossScale,
    OnHidden,
    OnOutput,
    ScheduleInputs,
    StageModel,
    StageModule,
    model_loss,
)
from evomesh.pipeline.stages import stages_of_rank

ZBV_SINCE = "2.13"  # the first version of torch that it is known to work with
ShouldStop = Callable[[int], bool]  # number of finished micro-batches


class Schedule(Protocol):
    """Runs all micro-batches of a batch; ``on_output`` is called on the ranks of the last stage, in order."""

    def train(
        self,
        batch: Batch,
        scales: Sequence[LossScale],
        terms: LossTerms,
        on_output: OnOutput,
        should_stop: ShouldStop | None = None,
    ) -> bool:
        """Run forward and backward: add the gradient of the sum over m of ``scales[m]`` times the summed loss of m.

        Returns:
            False when ``should_stop`` was true between two micro-batches, which ends the step there.
        """

    def evaluate(self, batch: Batch, on_output: OnOutput) -> None:
        """Run forward only, without gradient."""

    def read(self, batch: Batch, on_hidden: OnHidden) -> None:
        """Run forward only and without loss: the last stage's model and hidden states go to ``on_hidden``, in order."""


class SingleStageSchedule:
    """Schedule of a whole model on one rank: forward and backward of one micro-batch at a time."""

    def __init__(self, model: StageModel) -> None:
        self.model = model

    def train(
        self,
        batch: Batch,
        scales: Sequence[LossScale],
        terms: LossTerms,
        on_output: OnOutput,
        should_stop: ShouldStop | None = None,
    ) -> bool:
        for index, scale in enumerate(scales):
            if index > 0 and should_stop is not None and should_stop(index):
                return False
            output = self._loss(batch, index, scale, terms)
            torch.autograd.backward(output.scaled_sum)
            on_output(index, output)
        return True

    @torch.no_grad()
    def evaluate(self, batch: Batch, on_output: OnOutput) -> None:
        for index in range(len(batch.tokens)):
            on_output(index, self._loss(batch, index, 1.0, PLAIN))

    @torch.no_grad()
    def read(self, batch: Batch, on_hidden: OnHidden) -> None:
        for index, tokens in enumerate(batch.tokens):
            hidden = self.model(tokens, micro_batch_bounds(batch, index))
            on_hidden(index, self.model, hidden)

    def _loss(
        self, batch: Batch, index: int, scale: LossScale, terms: LossTerms
    ) -> LossOutput:
        hidden = self.model(batch.tokens[index], micro_batch_bounds(batch, index))
        return model_loss(self.model, hidden, batch.labels[index], scale, terms)


class PipelineSchedule:
    """Schedule of several stages, of which this rank holds ``models``.

    Args:
        models: this rank's chunks, in the order of ``stages_of_rank``.
        schedule: "1f1b", "interleaved" or "zbv".
        hidden_size: D.
        dtype: of the hidden states between stages.

    Raises:
        UserError: zbv with a version of torch that does not support it.
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
        pp = grid.pp
        self._kind = schedule
        self._pp = pp
        self._device = device
        self._hidden_size = hidden_size
        self._dtype = dtype
        # Sequence-parallel modes send [T / tp, D], mtp sends [T, D / tp].
        if mode.sequence_parallel:
            self._row_shards = grid.tp.size
            column_axis = Axis("tp")
        else:
            self._row_shards = 1
            column_axis = grid.tp
        self._column_shards = column_axis.size
        self._stages = stages_of_rank(pp.rank, pp.size, len(models), schedule)
        self._num_stages = pp.size * len(models)
        self._modules = []
        for model, stage in zip(models, self._stages, strict=True):
            is_first = stage == 0
            is_last = stage == self._num_stages - 1
            module = StageModule(model, is_first, is_last, column_axis)
            self._modules.append(module)
        self._torch_schedules: dict[tuple[int, int], Any] = {}
        self._transfers = TransferRecord(pp)

    def train(
        self,
        batch: Batch,
        scales: Sequence[LossScale],
        terms: LossTerms,
        on_output: OnOutput,
        should_stop: ShouldStop | None = None,
    ) -> bool:
        """Run forward and backward; ``should_stop`` is not called (see ``train_step``)."""
        del should_stop
        num_micro_batches, tokens = batch.tokens.shape
        # Torch's schedules are built for a fixed number of micro-batches.
        key = (num_micro_batches, tokens)
        if key not in self._torch_schedules:
            # A schedule keeps a buffer for each micro-batch: those of a ramp-up would
            # add up.
            self._torch_schedules.clear()
            self._torch_schedules[key] = self.build_torch_schedule(*key)
        # The first stage is given the numbers of the micro-batches, the last one the
        # labels, and the others nothing.
        arguments: tuple[Tensor, ...] = ()
        if 0 in self._stages:
            arguments = (torch.arange(num_micro_batches)[:, None],)
        target = None
        if self._num_stages - 1 in self._stages:
            target = batch.labels
        inputs = ScheduleInputs(batch, scales, terms, on_output)
        with self._stage_inputs(inputs), self._transfers.running():
            self._torch_schedules[key].step(
                *arguments, target=target, return_outputs=False
            )
        return True

    def evaluate(self, batch: Batch, on_output: OnOutput) -> None:
        unscaled = [1.0] * len(batch.tokens)
        self._run_forward(ScheduleInputs(batch, unscaled, PLAIN, on_output))

    def read(self, batch: Batch, on_hidden: OnHidden) -> None:
        def no_output(index: int, output: LossOutput) -> None:
            raise AssertionError("a pass that only reads has no loss")

        self._run_forward(ScheduleInputs(batch, [], PLAIN, no_output, on_hidden))

    @torch.no_grad()
    def _run_forward(self, inputs: ScheduleInputs) -> None:
        """Run forward only, in the order of ``evaluation_slots``.

        Written out because torch's own evaluation does not support a V-shaped stage
        order.
        """
        num_micro_batches, tokens = inputs.batch.tokens.shape
        all_stages = range(self._num_stages)
        rank_of_stage = list(map(self._rank_of, all_stages))
        slots = evaluation_slots(rank_of_stage, num_micro_batches)
        arrived: dict[StageVisit, Tensor] = {}  # inputs of visits on this rank
        if 0 in self._stages:
            arrived = first_inputs(num_micro_batches)
        with self._stage_inputs(inputs):
            sends: list[Any] = []
            for visits in slots:
                outputs = self._run_visits(visits, arrived)
                # No output is kept for longer than until the next one: earlier sends
                # end first.
                _wait_for(sends)
                sends = self._pass_on(visits, outputs, arrived, tokens)
            _wait_for(sends)

    def _run_visits(
        self, visits: Sequence[StageVisit], arrived: dict[StageVisit, Tensor]
    ) -> dict[StageVisit, Tensor]:
        """Run this rank's visits of one slot, at most one; return its output, and take its input from ``arrived``."""
        module_of = dict(zip(self._stages, self._modules, strict=True))
        outputs = {}
        for visit in visits:
            if visit.stage in module_of:
                module = module_of[visit.stage]
                outputs[visit] = module(arrived.pop(visit))
        return outputs

    def _pass_on(
        self,
        visits: Sequence[StageVisit],
        outputs: dict[StageVisit, Tensor],
        arrived: dict[StageVisit, Tensor],
        tokens: int,
    ) -> list[Any]:
        """Send this rank's outputs to their next stages and receive what others send it; return the pending sends.

        All ranks share the order of ``visits``, so that no two of them wait for each
        other.
        """
        sends = []
        for visit in visits:
            following = visit.next()
            is_source = visit.stage in self._stages
            is_target = following.stage in self._stages
            if is_source and is_target:  # the turn of a V
                arrived[following] = outputs[visit]
            elif is_source and following.stage < self._num_stages:
                sends.append(self._send(following.stage, outputs[visit]))
            elif is_target:
                arrived[following] = self._receive(
                    visit.stage, visit.micro_batch, tokens
                )
        return sends

    def rehearse(
        self,
        batch: Batch,
        scales: Sequence[LossScale],
        terms: LossTerms,
        on_output: OnOutput,
        should_stop: ShouldStop | None = None,
    ) -> bool:
        """Run forward and backward of this rank's stages with all sends and receives, for a trace of one rank.

        The order suits no other rank. It is meant for a fake process group, on which
        torch's schedules cannot agree on shapes.
        """
        del should_stop
        tokens = batch.tokens.shape[1]
        with self._stage_inputs(ScheduleInputs(batch, scales, terms, on_output)):
            for module, stage in zip(self._modules, self._stages, strict=True):
                for index in range(len(scales)):
                    self._rehearse_micro_batch(module, stage, index, tokens)
        return True

    def _rehearse_micro_batch(
        self, module: StageModule, stage: int, index: int, tokens: int
    ) -> None:
        x = self._receive(stage - 1, index, tokens)
        if not module.first:
            x.requires_grad_()  # the stage before wants its gradient
        output = module(x)
        if module.last:
            torch.autograd.backward(output)
        else:
            self._send(stage + 1, output)
            output_grad = self._receive(stage + 1, index, tokens)
            torch.autograd.backward(output, output_grad)
        if not module.first:
            assert x.grad is not None
            self._send(stage - 1, x.grad)

    def _receive(self, stage: int, index: int, tokens: int) -> Tensor:
        """Receive hidden states from ``stage``; the first stage gets the number of the micro-batch instead."""
        if stage < 0:
            return torch.tensor([[index]])
        buffer = torch.empty(
            self._message_shape(tokens),
            dtype=self._dtype,
            device=self._device,
        )
        sender = self._rank_of(stage)
        if sender == self._pp.rank:  # in a rehearsal, at the turn of a V
            return buffer
        return receive(buffer, self._pp, sender)

    def _send(self, stage: int, output: Tensor) -> Any:
        """Send to ``stage`` and return the pending send; None where that stage is on this rank."""
        rank = self._rank_of(stage)
        return (
            None
            if rank == self._pp.rank
            else launch_send(output.contiguous(), self._pp, rank)
        )

    def _rank_of(self, stage: int) -> int:
        chunk, position = divmod(stage, self._pp.size)
        on_way_back = self._kind == "zbv" and chunk == 1
        return self._pp.size - 1 - position if on_way_back else position

    def message_bytes(self, tokens: int) -> int:
        """Return the bytes of the hidden states of one micro-batch of ``tokens`` that ranks send to each other."""
        rows, columns = self._message_shape(tokens)
        return rows * columns * self._dtype.itemsize

    def _message_shape(self, tokens: int) -> tuple[int, int]:
        """Return the shape of the hidden states that ranks send to each other."""
        return tokens // self._row_shards, self._hidden_size // self._column_shards

    @contextmanager
    def _stage_inputs(self, inputs: ScheduleInputs) -> Iterator[None]:
        for module in self._modules:
            module.inputs, module.num_done = inputs, 0
        try:
            yield
        finally:
            for module in self._modules:
                module.inputs = None

    def build_torch_schedule(self, num_micro_batches: int, tokens: int) -> Any:
        """Build torch's schedule of this rank's stages."""
        # Imports FSDP and DTensor, 0.7 s that only pipelines pay.
        from torch.distributed import pipelining

        stages = self._build_torch_stages(tokens)
        # Sums, never means: the division by the number of targets is in the scales.
        options: dict[str, Any] = {
            "n_microbatches": num_micro_batches,
            "loss_fn": _pass_loss_through,
            "scale_grads": False,
        }
        if self._kind == "zbv":
            return pipelining.ScheduleZBVZeroBubble(stages, **options)
        if self._kind == "interleaved":
            return pipelining.ScheduleInterleaved1F1B(stages, **options)
        # With fewer micro-batches than stages 1F1B has no steady phase: all forwards,
        # then all backwards.
        if num_micro_batches < self._num_stages:
            return pipelining.ScheduleGPipe(stages[0], **options)
        return pipelining.Schedule1F1B(stages[0], **options)

    def _build_torch_stages(self, tokens: int) -> Any:
        """Build torch's stages with the shapes of their inputs and outputs, so that ranks need not exchange them."""
        from evomesh.pipeline.torch_stages import RecordedStage, ZeroBubbleStage

        stage_type = ZeroBubbleStage if self._kind == "zbv" else RecordedStage
        # Each stage maps hidden states to hidden states, except that the first one is
        # given the number of the micro-batch and the last one returns the loss.
        hidden = torch.empty(
            self._message_shape(tokens), dtype=self._dtype, device="meta"
        )
        loss_dtype = torch.promote_types(self._dtype, torch.float32)
        loss = torch.empty((), dtype=loss_dtype, device="meta")
        micro_batch = torch.empty(1, 1, dtype=torch.long, device="meta")
        stages = []
        for module, stage in zip(self._modules, self._stages, strict=True):
            output = loss if module.last else hidden
            torch_stage = stage_type(
                module,
                stage,
                self._num_stages,
                self._device,
                input_args=micro_batch
                if module.first
                else hidden.detach().requires_grad_(),
                output_args=output.detach().requires_grad_(),
                group=self._pp.group,
            )
            torch_stage.transfers = self._transfers
            stages.append(torch_stage)
        return stages


def refuse_zbv(version: str) -> None:
    """Refuse the zbv schedule with a version of torch that does not support it.

    Before 2.13, the backward that computes input gradients first stops at autograd
    functions written in Python, such as our losses and collectives.

    Args:
        version: a ``TorchVersion``, which compares by its numbers.

    Raises:
        UserError: ``version`` is too old.
    """
    if version < ZBV_SINCE:
        raise UserError(
            f"torch {version} cannot compute input and weight gradients of this model separately",
            where="parallel.pipeline.schedule",
            expected=f"torch {ZBV_SINCE} or later for zbv",
            fix='install it, or use schedule="interleaved"',
            code="EVO-PARALLEL-009",
        )


def _wait_for(sends: Sequence[Any]) -> None:
    for send in sends:
        send.wait()


def _pass_loss_through(output: Tensor, target: Tensor) -> Tensor:
    """Return the loss that the last stage has computed itself, because it needs more than ``target``."""
    del target
    return output.clone()
