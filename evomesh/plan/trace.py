"""One step of any rank of any world, traced in one process: no data, no weights, no other rank.

The model is built on the meta device and the process groups on torch's fake backend, so that the very code that trains
says what it would send and hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from evomesh.config.layout import check_world
from evomesh.config.schema import Config
from evomesh.data.batch import Batch
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.build import build_grid
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.process_group import fake_world
from evomesh.parallel.spec import local_shard
from evomesh.parallel.traffic import TrafficLog, record_traffic
from evomesh.pipeline.schedule import PipelineSchedule
from evomesh.train.stages import ModelStages, build_stages


@dataclass(frozen=True)
class RankMemory:
    """Attributes:
    grid: where the rank stands.
    parameters, gradients, optimizer: bytes that the rank holds; gradients as they accumulate.
    layers: global numbers of the layers it holds.
    """

    grid: Grid
    parameters: int
    gradients: int
    optimizer: int
    layers: list[int]


@dataclass(frozen=True)
class StepTrace(RankMemory):
    """Attributes:
    traffic: every collective and send of one step, in order; the norm's one number is left out.
    passes: how many of them, the first, belong to forward and backward; the rest to the optimizer.
    """

    traffic: TrafficLog
    passes: int


def hold(config: Config, world_size: int, rank: int = 0) -> RankMemory:
    """What ``rank`` holds between two steps.

    Raises:
        UserError: the layout does not fit.
    """
    with _built(config, world_size, rank) as (grid, stages, optimizer):
        return RankMemory(grid, *_held(stages, optimizer))


def trace(config: Config, world_size: int, rank: int = 0) -> StepTrace:
    """Traces one optimizer step of ``rank``.

    Raises:
        UserError: the layout does not fit.
    """
    with _built(config, world_size, rank) as (grid, stages, optimizer):
        batch = _batch(config)
        scales = [1.0] * config.data.micro_num
        schedule = stages.schedule
        held = _held(stages, optimizer)
        with record_traffic(grid) as traffic:
            optimizer.expect_micro_batches(config.data.micro_num)
            run = schedule.rehearse if isinstance(schedule, PipelineSchedule) else schedule.train
            run(batch, scales, config.loss.label_smoothing, lambda index, output: None)
            passes = len(traffic.calls)
            optimizer.communicate_only()
        return StepTrace(grid, *held, traffic, passes)


@contextmanager
def _built(config: Config, world_size: int, rank: int) -> Iterator[tuple[Grid, ModelStages, ZeroOptimizer]]:
    """The rank's grid, model and optimizer, in a world that is not there."""
    check_world(config, world_size)
    with fake_world(world_size, rank), weights_on_meta():
        grid = build_grid(config.parallel, world_size, rank)
        settings = config.model_copy(update={"model": config.model.model_copy(update={"compile": False})})
        stages = build_stages(settings, grid, MODES[config.parallel.tensor.mode], torch.device("meta"))
        parameters = stages.parameters()
        optimizer = ZeroOptimizer(
            parameters.items(), config.adam, config.hybrid_zero_optimizer, grid, stages.module
        )
        yield grid, stages, optimizer


def _held(stages: ModelStages, optimizer: ZeroOptimizer) -> tuple[int, int, int, list[int]]:
    parameters = stages.parameters()
    return (
        _bytes(list(parameters.values())),
        sum(slot.local.numel() * slot.gradient_dtype.itemsize for slot in optimizer.slots),
        _bytes(list(optimizer.state_tensors().values())),
        sorted({int(name.split(".")[1]) for name in parameters if name.startswith("layers.")}),
    )


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Lets FSDP2 run on the meta device: with the CPU's streams, which are none, and without asking for values."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    streams = SimpleNamespace(**vars(torch.cpu))
    streams.current_device = lambda: 0  # torch.cpu's own answer is no index
    with (
        patch.object(torch, "meta", streams, create=True),
        patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
    ):
        yield


def _batch(config: Config) -> Batch:
    """M micro-batches of documents of ``seq_len``; only the bounds are real."""
    count, tokens = config.data.micro_num, config.data.packed_length
    ids = torch.zeros(count, tokens, dtype=torch.long, device="meta")
    bounds = torch.arange(0, tokens + 1, config.data.seq_len, dtype=torch.int32).expand(count, -1)
    return Batch(ids, ids, ids, ids, bounds, config.data.seq_len)


def _bytes(tensors: list[Tensor]) -> int:
    here = [local_shard(tensor) for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in here)
