"""Trace of one training step of any rank of any world, in one process: without data, weights or other ranks.

The training code itself runs, with the model on the meta device and with process groups
of torch's fake backend, and reports what it would hold and send.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor

from evomesh.config.layout import check_world, run_parallel
from evomesh.config.schema import Config
from evomesh.data.batch import Batch
from evomesh.layers.block_softmax import LossTerms
from evomesh.layers.loss import LossOutput
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.build import build_grid
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.process_group import fake_world
from evomesh.parallel.spec import local_shard
from evomesh.parallel.traffic import TrafficLog, record_traffic
from evomesh.pipeline.schedule import PipelineSchedule
from evomesh.plan.unread_values import KnownBounds, tensors_without_values
from evomesh.train.stages import ModelStages, build_optimizer, build_stages


class TracedDevice(Enum):
    """Device that a trace is for, by the type of the tensors that stand for its own."""

    CUDA = "meta"  # shapes and dtypes of CUDA's kernels, and no memory
    CPU = "cpu"  # fake tensors, which take the CPU's paths through the code


@dataclass(frozen=True)
class RankMemory:
    """Memory that one rank holds between two steps.

    Attributes:
        grid: the axes as the rank sees them.
        parameters, gradients, optimizer: bytes that the rank holds; gradients in the dtype in which they accumulate.
        layers: global indices of its layers.
    """

    grid: Grid
    parameters: int
    gradients: int
    optimizer: int
    layers: list[int]


@dataclass(frozen=True)
class StepTrace(RankMemory):
    """Memory of one rank, and what it sends in one step.

    Attributes:
        traffic: every collective and send of one step, in order, except the norm's single number.
        passes: how many of them belong to forward and backward; they come first, then the optimizer's.
    """

    traffic: TrafficLog
    passes: int


def hold(config: Config, world_size: int, rank: int = 0) -> RankMemory:
    """Compute what ``rank`` holds between two steps.

    Raises:
        UserError: the layout does not fit.
    """
    with built_rank(config, world_size, rank) as (grid, stages, optimizer):
        return RankMemory(grid, *_held(stages, optimizer))


def trace(config: Config, world_size: int, rank: int = 0) -> StepTrace:
    """Trace one optimizer step of ``rank``.

    Raises:
        UserError: the layout does not fit.
    """
    with built_rank(config, world_size, rank) as (grid, stages, optimizer):
        micro_num = config.data.micro_num
        batch = empty_batch(config, micro_num)
        scales = [1.0] * micro_num
        terms = LossTerms.of(config.loss)
        schedule = stages.schedule
        held = _held(stages, optimizer)
        # Torch's pipeline schedules agree on shapes with the other ranks, which do not
        # exist here: a rehearsal runs the same forward and backward passes of this rank.
        run = schedule.train
        if isinstance(schedule, PipelineSchedule):
            run = schedule.rehearse
        with record_traffic(grid) as traffic:
            optimizer.expect_micro_batches(micro_num)
            run(batch, scales, terms, ignore_output)
            passes = len(traffic.calls)
            # Without values there is no update, only what it would send.
            optimizer.communicate_only()
        return StepTrace(grid, *held, traffic, passes)


def ignore_output(index: int, output: LossOutput) -> None:
    """Do nothing with the loss of a micro-batch: on the meta device it has no value."""


@contextmanager
def built_rank(
    config: Config,
    world_size: int,
    rank: int,
    streams: SimpleNamespace | None = None,
    device: TracedDevice = TracedDevice.CUDA,
) -> Iterator[tuple[Grid, ModelStages, ZeroOptimizer]]:
    """Build the rank's grid, model and optimizer in a fake world.

    Args:
        streams: stands for torch's stream interface of the device; None: streams without effect.
        device: whose tensors the ``with`` block makes.
    """
    check_world(config, world_size)
    # The compiler would only cost time: collectives are the same without it.
    model_config = config.model.model_copy(update={"compile": False})
    traced_config = config.model_copy(update={"model": model_config})
    mode = MODES[config.parallel.tensor.mode]
    with ExitStack() as stack:
        stack.enter_context(fake_world(world_size, rank))
        grid = build_grid(run_parallel(config, world_size), world_size, rank)
        if device is TracedDevice.CPU:
            stack.enter_context(tensors_without_values())
        else:
            stack.enter_context(weights_on_meta(streams))
        stages = build_stages(
            traced_config,
            grid,
            mode,
            torch.device(device.value),
        )
        optimizer = build_optimizer(config, stages, grid)
        yield grid, stages, optimizer


def _held(
    stages: ModelStages, optimizer: ZeroOptimizer
) -> tuple[int, int, int, list[int]]:
    """Return bytes of parameters, gradients and optimizer state, and the indices of the layers."""
    parameters = stages.parameters()
    state = optimizer.state_tensors()
    # A gradient accumulates in another dtype than its parameter may have.
    gradient_bytes = 0
    for slot in optimizer.slots:
        gradient_bytes += slot.local.numel() * slot.gradient_dtype.itemsize
    layers = set()
    for name in parameters:
        # layers.31.attention.wqkv.weight: the index counts over all stages.
        if name.startswith("layers."):
            _, index, *_ = name.split(".")
            layers.add(int(index))
    return (
        _bytes(list(parameters.values())),
        gradient_bytes,
        _bytes(list(state.values())),
        sorted(layers),
    )


@contextmanager
def weights_on_meta(streams: SimpleNamespace | None = None) -> Iterator[None]:
    """Let FSDP2 run on the meta device: with the given streams, and without its check for meta tensors.

    Args:
        streams: None: those of the CPU, which do nothing.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    if streams is None:
        streams = SimpleNamespace(**vars(torch.cpu))
        streams.current_device = lambda: 0  # torch.cpu returns a name, not an index
    with (
        patch.object(torch, "meta", streams, create=True),
        patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
        # From torch 2.15 on: it asks the stream for a number, which that of a CPU lacks.
        patch.object(
            _fsdp_collectives,
            "record_grad_output_stream",
            lambda buffer, stream: None,
            create=True,
        ),
    ):
        yield


def host_batch(config: Config, micro_num: int) -> Batch:
    """Make M micro-batches of segments of ``seq_len`` tokens as a loader does, each token with a target."""
    empty = empty_batch(config, micro_num)
    data = config.data
    bounds = range(0, data.packed_length + 1, data.seq_len)
    ids = torch.zeros(micro_num, config.data.packed_length, dtype=torch.long)
    return replace(
        empty,
        tokens=ids,
        labels=ids.clone(),
        position_ids=ids.clone(),
        type_ids=ids.clone(),
        host_bounds=cast(Tensor, KnownBounds(tuple(bounds))),
    )


def empty_batch(config: Config, micro_num: int) -> Batch:
    """Make M micro-batches of segments of ``seq_len`` tokens; only the bounds have values."""
    data = config.data
    tokens = data.packed_length
    ids = torch.zeros(micro_num, tokens, dtype=torch.long, device="meta")
    bounds_of_one = torch.arange(0, tokens + 1, data.seq_len, dtype=torch.int32)
    bounds = bounds_of_one.expand(micro_num, -1)
    return Batch(
        tokens=ids,
        labels=ids,
        position_ids=ids,
        type_ids=ids,
        cu_seqlens=bounds,
        max_seqlen=data.seq_len,
    )


def _bytes(tensors: list[Tensor]) -> int:
    shards = [local_shard(tensor) for tensor in tensors]
    return sum(shard.numel() * shard.element_size() for shard in shards)
