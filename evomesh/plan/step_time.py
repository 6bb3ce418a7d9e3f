"""Time of a training step: the timelines of the ranks of one pipeline, on a device.

config -> timeline of each pipeline rank -> seconds of forward, backward, update -> schedule -> seconds of a step
          (timeline)                        (simulate)                              (pipeline_time)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evomesh.config.layout import pipeline_schedule, run_sizes
from evomesh.config.schema import Config
from evomesh.config.size import tokens_per_step
from evomesh.data.batch import Batch
from evomesh.layers.block_softmax import LossTerms
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.build import axis_members
from evomesh.parallel.grid import Grid
from evomesh.pipeline.action_order import (
    ScheduleAction,
    one_forward_one_backward,
    read_order,
)
from evomesh.pipeline.schedule import PipelineSchedule
from evomesh.pipeline.stages import stages_of_rank
from evomesh.plan.device import Device
from evomesh.plan.memory import local_bytes
from evomesh.plan.pipeline_time import (
    StageSeconds,
    TimedActions,
    last_end,
    timed_actions,
)
from evomesh.plan.shared_cores import SharedCores
from evomesh.plan.simulate import AxisPlacement, StreamTimes, simulate
from evomesh.plan.timeline import (
    Event,
    KernelKind,
    RecordedStreams,
    Timeline,
    TimelineRecorder,
    Transfer,
)
from evomesh.plan.trace import (
    TracedDevice,
    built_rank,
    empty_batch,
    host_batch,
    ignore_output,
)
from evomesh.train.stages import ModelStages
from evomesh.train.step import micro_batch_weights

# The one before it finds no gradients to which it would add.
OPENING = "opening micro-batch"
FIRST = "first micro-batch"
LAST = "last micro-batch"
UPDATE = "update"
SUMS = ("reduce_scatter", "all_reduce")
# Losses of a step that travel with the norm: the objective, its z-loss, and those of one type of data.
_SUMS = 6


@dataclass(frozen=True)
class RankTimeline:
    """Timeline of one rank in a micro-batch, in the last one, and in the update.

    Attributes:
        stages: global numbers of its stages.
        optimizer_bytes: that the update reads and writes in memory.
        has_update: the kernels of the update are in the timeline.
    """

    timeline: Timeline
    stages: tuple[int, ...]
    optimizer_bytes: int
    has_update: bool = False

    def update_seconds(self, device: Device) -> float:
        """Return the time of an update that is not in the timeline."""
        if self.has_update:
            return 0.0
        return device.memory_seconds(self.optimizer_bytes)

    def part(self, prefix: str) -> list[Event]:
        """Return a part without the transfers between stages, which the schedule times."""
        events = []
        for event in self.timeline.part(prefix):
            between_stages = isinstance(event, Transfer) and event.call.axis == "pp"
            if not between_stages:
                events.append(event)
        return events

    def end_of_step(self) -> tuple[list[Event], list[Event]]:
        """Return the last micro-batch with the sums of all gradients, and what comes after the update: gathers.

        The norm needs all sums, and the update the norm. A timeline that has the update leaves nothing for after it.
        """
        update = self.part(UPDATE)
        if self.has_update:
            return self.part(LAST) + update, []
        first_gather = 0
        for number, event in enumerate(update, 1):
            if not isinstance(event, Transfer):
                continue
            if event.call.operation in SUMS:
                first_gather = number
        sums = self.part(LAST) + update[:first_gather]
        return sums, update[first_gather:]


@dataclass(frozen=True)
class RankSeconds:
    """Seconds of one rank, by what it does.

    Attributes:
        stages: forward and backward of a micro-batch, by stage.
        micro_batch: all stages, forward and backward.
        exposed: of a micro-batch, in which compute waits for collectives.
        last: how much longer the last micro-batch is with the update after it.
        busy: of a micro-batch, by kind of kernel and by collective.
    """

    stages: dict[int, StageSeconds]
    micro_batch: float
    exposed: float
    last: float
    busy: dict[str, float]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of the slowest rank, and what they are.

    Attributes:
        tokens: of a step, of all ranks.
        ranks: number of them.
        busy: seconds by kind of kernel and by collective.
        exposed: seconds in which compute waits for collectives of its micro-batches.
        bubble: seconds in which it waits for other stages.
        update: seconds that the last micro-batch and the update need beyond a micro-batch.
    """

    seconds: float
    tokens: int
    ranks: int
    busy: dict[str, float]
    exposed: float
    bubble: float
    update: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.seconds / self.ranks

    def parts(self) -> dict[str, float]:
        """Return seconds by what a rank does; collectives count as far as compute waits for them."""
        parts = {}
        for kind in KernelKind:
            name = kind.value
            if name in self.busy:
                parts[name] = self.busy[name]
        waits = {
            "waiting for collectives": self.exposed,
            "waiting for other stages": self.bubble,
            "reducing, updating, gathering": self.update,
        }
        for name, seconds in waits.items():
            if seconds > 0:
                parts[name] = seconds
        return parts


def predict_step(config: Config, world_size: int, device: Device) -> StepTime:
    """Predict the time of a step, from a trace of each rank of one pipeline.

    Raises:
        UserError: the layout does not fit.
    """
    ranks = []
    device = device.in_world(world_size)
    for rank in first_pipeline(config, world_size):
        seconds = rank_seconds(config, world_size, rank, device)
        ranks.append(seconds)
    return combine(ranks, config, world_size, device)


def first_pipeline(config: Config, world_size: int) -> range:
    """Return the ranks of one pipeline; ranks of other axes do the same as these."""
    sizes = run_sizes(config, world_size)
    distance = sizes.ranks_per_stage
    end = sizes.pp * distance
    return range(0, end, distance)


def rank_seconds(
    config: Config, world_size: int, rank: int, device: Device
) -> RankSeconds:
    """Trace a rank and predict how long it takes."""
    timeline = trace_timeline(config, world_size, rank, traced_device(device))
    return time_rank(timeline, config, world_size, rank, device)


def traced_device(device: Device) -> TracedDevice:
    """Return whose code paths a trace for a device takes."""
    return TracedDevice.CPU if device.kind == "cpu" else TracedDevice.CUDA


def trace_timeline(
    config: Config,
    world_size: int,
    rank: int,
    traced: TracedDevice = TracedDevice.CUDA,
) -> RankTimeline:
    """Trace two micro-batches and the update of ``rank``; on a CPU three, and the kernels of the update too.

    Raises:
        UserError: the layout does not fit.
    """
    timeline = Timeline()
    streams = RecordedStreams(timeline)
    build = built_rank(config, world_size, rank, streams.interface(), traced)
    on_cpu = traced is TracedDevice.CPU
    with build as (grid, stages, optimizer):
        schedule = stages.schedule
        run = schedule.train
        if isinstance(schedule, PipelineSchedule):
            run = schedule.rehearse
        held = _stages_held(config, grid.pp.rank)
        batch = host_batch(config, 1) if on_cpu else empty_batch(config, 1)
        terms = LossTerms.of(config.loss)
        names = [OPENING, FIRST, LAST] if on_cpu else [FIRST, LAST]
        optimizer.expect_micro_batches(len(names))
        sections = _StageSections(timeline, stages, held)
        recorder = TimelineRecorder(timeline, streams, grid, traced.value)
        with sections.marking(), recorder:
            for name in names:
                sections.begin(name)
                run(batch, [1.0], terms, ignore_output)
            timeline.begin(UPDATE)
            if on_cpu:
                _update(optimizer, batch, grid, config)
            else:
                optimizer.communicate_only()
        nbytes = _optimizer_bytes(optimizer)
    return RankTimeline(timeline, held, nbytes, has_update=on_cpu)


def _update(optimizer: ZeroOptimizer, batch: Batch, grid: Grid, config: Config) -> None:
    """Do what a step does beside its micro-batches: count targets, sum losses, update."""
    micro_batch_weights(batch.labels, grid, config.loss)
    sums = torch.zeros(_SUMS, dtype=torch.float64, device=batch.labels.device)
    optimizer.step(lr=1e-4, beta2=0.95, inv_scale=1.0, sums=sums)
    optimizer.zero_grad()


def _optimizer_bytes(optimizer: ZeroOptimizer) -> int:
    """Return what the update moves: it reads and writes masters and moments, and reads as many gradients."""
    masters = 0
    state = 0
    for name, tensor in optimizer.state_tensors().items():
        nbytes = local_bytes(tensor)
        state += nbytes
        if name.startswith("optim.master."):
            masters += nbytes
    return 2 * state + masters


class _StageSections:
    """Divides a micro-batch of a timeline into forward and backward of each stage."""

    def __init__(
        self, timeline: Timeline, stages: ModelStages, held: Sequence[int]
    ) -> None:
        self._timeline = timeline
        self._models = dict(zip(held, stages.models, strict=True))
        self._name = ""

    def begin(self, name: str) -> None:
        self._name = name
        self._timeline.begin(name)

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Begin sections in the ``with`` block."""
        hooks: list[RemovableHandle] = []
        for stage, model in self._models.items():
            forward = partial(self._begin_forward, stage)
            backward = partial(self._wait_for_backward, stage)
            hooks.append(model.register_forward_pre_hook(forward))
            hooks.append(model.register_forward_hook(backward))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin_forward(self, stage: int, _: nn.Module, __: Any) -> None:
        self._timeline.begin(f"{self._name}, F {stage};")

    def _wait_for_backward(
        self, stage: int, _: nn.Module, __: Any, hidden: Tensor
    ) -> None:
        name = f"{self._name}, B {stage};"
        hidden.register_hook(lambda _: self._timeline.begin(name))  # type: ignore[no-untyped-call]


def time_rank(
    traced: RankTimeline, config: Config, world_size: int, rank: int, device: Device
) -> RankSeconds:
    """Simulate what a rank does with a micro-batch, and with the last one and the update."""
    places = axis_placements(config, world_size, rank, device)
    dtype = config.model.dtype.removeprefix("torch.")

    def run(*prefixes: str) -> StreamTimes:
        events = []
        for prefix in prefixes:
            events += traced.part(prefix)
        return simulate(events, device, dtype, places)

    stages = {}
    for stage in traced.stages:
        forward = run(f"{FIRST}, F {stage};")
        backward = run(f"{FIRST}, B {stage};")
        stages[stage] = StageSeconds(forward.end, backward.end)
    first = run(FIRST)
    sums, gathers = traced.end_of_step()
    last = simulate(sums, device, dtype, places)
    update = traced.update_seconds(device)
    gathered = simulate(gathers, device, dtype, places)
    longer = last.end - first.end
    opening = run(OPENING)
    if opening.end:
        longer += opening.end - first.end
    return RankSeconds(
        stages=stages,
        micro_batch=first.end,
        exposed=first.exposed,
        last=longer + update + gathered.end,
        busy=first.busy,
    )


def combine(
    ranks: Sequence[RankSeconds], config: Config, world_size: int, device: Device
) -> StepTime:
    """Return the time of a step of a pipeline with these ranks."""
    count = config.data.micro_num
    slowest = max(ranks, key=lambda rank: rank.micro_batch)
    computing = slowest.micro_batch * count
    in_pipeline = computing
    if len(ranks) > 1:
        in_pipeline = last_end(schedule_ranks(ranks, config, world_size, device))
    update = max(rank.last for rank in ranks)
    busy = {what: seconds * count for what, seconds in slowest.busy.items()}
    sizes = run_sizes(config, world_size)
    return StepTime(
        seconds=in_pipeline + update,
        tokens=tokens_per_step(config, sizes.dp),
        ranks=world_size,
        busy=busy,
        exposed=slowest.exposed * count,
        bubble=max(in_pipeline - computing, 0.0),
        update=update,
    )


def schedule_ranks(
    ranks: Sequence[RankSeconds], config: Config, world_size: int, device: Device
) -> TimedActions:
    """Return when each of several ranks of a pipeline does its forwards and backwards."""
    stages: dict[int, StageSeconds] = {}
    for rank in ranks:
        stages |= rank.stages
    in_order = [stages[number] for number in sorted(stages)]
    order = action_order(config, world_size)
    hop = hop_seconds(config, world_size, device)
    if device.host is None:
        return timed_actions(order, in_order, hop)
    # A rank sends by the core on which it computes. How many ranks share the cores, the
    # order of actions says.
    sending = hop * (1 - device.hidden)
    alone = []
    for stage in _stages_with_sends(in_order, sending):
        alone.append(stage.divided(device.turns))
    pipelines = device.processes // len(order)
    sharing = SharedCores(
        cores=device.host.cores,
        pipelines=max(pipelines, 1),
    )
    return timed_actions(order, alone, hop - sending, sharing)


def _stages_with_sends(
    stages: Sequence[StageSeconds], sending: float
) -> Iterator[StageSeconds]:
    """Yield the times of stages with those of sending on what they have computed."""
    last = len(stages) - 1
    for number, stage in enumerate(stages):
        forward = stage.forward
        backward = stage.backward
        if number < last:
            forward += sending
        if number > 0:
            backward += sending
        yield StageSeconds(forward, backward)


def hop_seconds(config: Config, world_size: int, device: Device) -> float:
    """Return the time of a hidden state from one stage to the next; 0 without a pipeline."""
    sizes = run_sizes(config, world_size)
    if sizes.pp == 1:
        return 0.0
    model = config.model
    elements = config.data.packed_length * model.hidden_size
    itemsize = 2
    if model.dtype.endswith("32"):
        itemsize = 4
    # Every mode of tensor parallelism sends a share of the hidden state.
    nbytes = elements * itemsize // sizes.tp
    nodes = 1
    if sizes.ranks_per_stage >= device.gpus_per_node:
        nodes = 2
    return device.transfer_seconds("send", nbytes, 2, nodes)


def axis_placements(
    config: Config, world_size: int, rank: int, device: Device
) -> dict[str, AxisPlacement]:
    """Return ranks and nodes of the axes through ``rank``, with ranks in their order on nodes."""
    sizes = run_sizes(config, world_size)
    members_of = axis_members(sizes, rank)
    members_of["world"] = list(range(world_size))
    per_node = device.gpus_per_node
    placements = {}
    for name, members in members_of.items():
        nodes = {member // per_node for member in members}
        placement = AxisPlacement(len(members), len(nodes))
        placements[name] = placement
    return placements


def _stages_held(config: Config, pipeline_rank: int) -> tuple[int, ...]:
    pp = config.parallel.pipeline.size
    if pp == 1:
        return (0,)
    chunks = config.model.num_chunks
    kind = pipeline_schedule(config)
    return tuple(stages_of_rank(pipeline_rank, pp, chunks, kind))


def action_order(
    config: Config, world_size: int
) -> Mapping[int, Sequence[ScheduleAction]]:
    """Return what each rank of a pipeline computes in a step, in its order."""
    kind = pipeline_schedule(config)
    count = config.data.micro_num
    if kind == "1f1b":
        return one_forward_one_backward(config.parallel.pipeline.size, count)
    with built_rank(config, world_size, 0) as (_, stages, _):
        schedule = stages.schedule
        assert isinstance(schedule, PipelineSchedule)
        tokens = config.data.packed_length
        return read_order(schedule.build_torch_schedule(count, tokens))
