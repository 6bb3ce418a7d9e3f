"""Memory of one rank over a whole training step: the step runs without values, and every storage is written down.

It is the step of the training code: its schedule with its micro-batches in flight, its
buckets, its update. One step runs before the one that is written down, because a step
begins with what the one before it left: gathers that are pending, empty storages of FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from evomesh.config.layout import pipeline_schedule
from evomesh.config.schema import Config
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import local_shard
from evomesh.pipeline.stages import stages_of_rank
from evomesh.plan.fake_pipeline import pipeline_in_fake_world
from evomesh.plan.memory_timeline import MemoryTimeline, stack_changes
from evomesh.plan.outside_memory import communicators, outside_tensors
from evomesh.plan.storage_lives import (
    GRADIENTS,
    KINDS,
    MASTERS,
    MOMENTS,
    WEIGHTS,
    StorageLives,
)
from evomesh.plan.trace import TracedDevice, built_rank, host_batch
from evomesh.train import step as training_step
from evomesh.train.stages import ModelStages
from evomesh.train.step import train_step


def trace_step_memory(
    config: Config,
    world_size: int,
    rank: int = 0,
    device: TracedDevice = TracedDevice.CUDA,
) -> MemoryTimeline:
    """Trace a step of ``rank`` for what it holds.

    Raises:
        UserError: the layout does not fit.
    """
    build = built_rank(config, world_size, rank, device=device)
    with build as (grid, stages, optimizer), _without_results():
        lives = StorageLives(device.value)
        with_loss = _models_with_loss(config, grid, stages)
        lives.watch_models(stages.models, with_loss)
        hold_state(lives, stages, optimizer)
        step = TracedStep(config, grid, stages, optimizer)
        with lives.watching(), pipeline_in_fake_world(device, lives):
            fewest = _fewest_micro_batches(config, grid)
            step.run(fewest, lives)
            lives.restart()
            micro_num = traced_micro_batches(config, grid)
            untraced = config.data.micro_num - micro_num
            others = _rest_of_batch(config, untraced, device)
            step.run(micro_num, lives)
            del others
    return _timeline(lives, rank, grid, micro_num, device)


class TracedStep:
    """A training step of a rank whose tensors have no values."""

    def __init__(
        self,
        config: Config,
        grid: Grid,
        stages: ModelStages,
        optimizer: ZeroOptimizer,
    ) -> None:
        self._config = config
        self._grid = grid
        self._stages = stages
        self._optimizer = optimizer

    def run(self, micro_num: int, lives: StorageLives) -> None:
        """Run forward and backward of M micro-batches, and the update."""
        config = self._config
        batch = host_batch(config, micro_num)
        with lives.marking_update(self._optimizer):
            train_step(
                batch,
                schedule=self._stages.schedule,
                optimizer=self._optimizer,
                scaler=LossScaler(config.grad_scaler, config.model.dtype),
                grid=self._grid,
                loss_config=config.loss,
                data_types=["en"],
                lr=1e-4,
                beta2=0.95,
            )


def hold_state(
    lives: StorageLives, stages: ModelStages, optimizer: ZeroOptimizer
) -> None:
    """Say what the tensors are for that are there during the whole step."""
    for slot in optimizer.slots:
        lives.watch_gradient(slot.param)
        if slot.accumulated_grad is not None:
            lives.hold(slot.accumulated_grad, GRADIENTS)
    for name, tensor in optimizer.state_tensors().items():
        is_master = name.startswith("optim.master.")
        kind = MASTERS if is_master else MOMENTS
        lives.hold(tensor, kind)
    # Last: the master of a float32 parameter is the parameter.
    for parameter in stages.parameters().values():
        shard = local_shard(parameter)
        lives.hold(shard, WEIGHTS)


def traced_micro_batches(config: Config, grid: Grid) -> int:
    """Return how many micro-batches show what a step holds: more of them would repeat those in the middle."""
    pp = grid.pp.size
    if pp == 1:
        # One that finds gradients, and where the last one launches buckets the last one.
        enough = 3 if config.hybrid_zero_optimizer.overlap_sync_grad else 2
    elif pipeline_schedule(config) == "1f1b":
        # Those in flight, and two of the steady state.
        enough = pp + 2
    else:
        # Torch keeps what these schedules send until the end of a step.
        enough = config.data.micro_num
    return min(config.data.micro_num, enough)


def _rest_of_batch(config: Config, micro_num: int, device: TracedDevice) -> Tensor:
    """Make what the batch has of micro-batches that are not traced: tokens, labels, positions, types."""
    shape = (4, micro_num, config.data.packed_length)
    return torch.empty(shape, dtype=torch.long, device=device.value)


def _fewest_micro_batches(config: Config, grid: Grid) -> int:
    """Return how many micro-batches a step can have."""
    if grid.pp.size == 1 or pipeline_schedule(config) == "1f1b":
        return 1
    return min(config.data.micro_num, grid.pp.size)


def _models_with_loss(
    config: Config, grid: Grid, stages: ModelStages
) -> list[torch.nn.Module]:
    pp = grid.pp
    if pp.size == 1:
        return list(stages.models)
    chunks = config.model.num_chunks
    kind = pipeline_schedule(config)
    last = pp.size * chunks - 1
    held = stages_of_rank(pp.rank, pp.size, chunks, kind)
    return [
        model for model, stage in zip(stages.models, held, strict=True) if stage == last
    ]


@contextmanager
def _without_results() -> Iterator[None]:
    """Let the step read zeros where it reads its results."""

    def zeros(results: Tensor) -> Tensor:
        return torch.zeros(results.shape, dtype=results.dtype, device="cpu")

    with patch.object(training_step, "copy_to_host", zeros):
        yield


def _timeline(
    lives: StorageLives, rank: int, grid: Grid, micro_num: int, device: TracedDevice
) -> MemoryTimeline:
    points = stack_changes(lives.changes(), KINDS)
    totals = [sum(nbytes) for _, nbytes in points]
    series = zip(*(nbytes for _, nbytes in points), strict=True)
    return MemoryTimeline(
        rank=rank,
        kinds=KINDS,
        positions=tuple(position for position, _ in points),
        nbytes=tuple(series),
        peak=totals.index(max(totals)),
        parts=lives.parts(),
        micro_batches=micro_num,
        outside=outside_tensors(communicators(grid), max(totals), device),
    )
