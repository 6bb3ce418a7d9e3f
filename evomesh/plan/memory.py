"""Most memory of a rank in a step: the tensors of a real step on the meta device are counted.

The meta device stands for CUDA: shapes and dtypes are those of its kernels, nothing is
computed. A step has three phases, whose peaks differ by what is alive:

    loss        kept activations, a chunk of logits, the gradient of the head
    backward    ever fewer activations; gathered and recomputed layers, gradients, sums of buckets
    update      sums of buckets, gathered parameters

What is alive in all of them (weights, gradients, masters, moments) is counted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.config.layout import pipeline_schedule
from evomesh.config.schema import Config
from evomesh.layers.block_softmax import LossTerms
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.spec import local_shard
from evomesh.pipeline.schedule import PipelineSchedule
from evomesh.pipeline.stages import stages_of_rank
from evomesh.plan.memory_timeline import MemoryTimeline
from evomesh.plan.outside_memory import communicators, outside_tensors
from evomesh.plan.step_memory import trace_step_memory
from evomesh.plan.trace import TracedDevice, built_rank, empty_batch, ignore_output
from evomesh.train.stages import ModelStages
from evomesh.train.storage_watch import StorageWatch

GIB = 2**30
# Of a GPU's memory, where it is not estimated for the layout: see ``outside_memory``.
RESERVED = 2 * GIB


def _reserved() -> dict[str, int]:
    return {"CUDA, NCCL and fragmentation": RESERVED}


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one rank when most of them are in use.

    Attributes:
        kinds: bytes by kind, at the peak; they add up to ``total``.
        phase: the part of the step that has the peak, such as "loss" or "backward".
        outside: estimated bytes that no tensor has.
    """

    kinds: dict[str, int]
    phase: str
    outside: dict[str, int] = field(default_factory=_reserved)

    @classmethod
    def of_timeline(cls, timeline: MemoryTimeline) -> PeakMemory:
        return cls(timeline.at_peak, timeline.peak_part, timeline.outside)

    @property
    def total(self) -> int:
        """Bytes of tensors."""
        return sum(self.kinds.values())

    @property
    def needed(self) -> int:
        """Bytes of tensors and of what is estimated beside them."""
        return self.total + sum(self.outside.values())

    def missing(self, capacity: int) -> int:
        """Return the bytes that a device of ``capacity`` bytes lacks; 0 or less where the step fits."""
        return self.needed - capacity


@dataclass(frozen=True)
class TracedMemory:
    """Memory of a traced step of one rank.

    Attributes:
        held: bytes by kind that are there during the whole step.
        kept: bytes of activations that one micro-batch keeps for backward.
        peaks: the most bytes beyond ``held`` in each phase, with one micro-batch.
        micro_batches: how many of them keep activations at one time.
        communicators: of the rank; None: unknown.
        device: that was traced.
    """

    held: dict[str, int]
    kept: int
    peaks: dict[str, Peak]
    micro_batches: int
    communicators: int | None = None
    device: TracedDevice = TracedDevice.CUDA

    def peak(self) -> PeakMemory:
        """Return the peak of all phases, with all micro-batches in flight."""
        # 1. Of the micro-batches that a pipeline keeps, the trace had one.
        waiting = self.kept * (self.micro_batches - 1)
        peaks = dict(self.peaks)
        for phase in ("loss", "backward"):
            traced = peaks[phase]
            peaks[phase] = traced.with_bytes(waiting)

        # 2. The highest peak, and what its bytes are.
        phase = _highest(peaks)
        peak = peaks[phase]
        activations = self.kept * self.micro_batches
        if phase == "update":
            activations = 0  # backward has used them up
        lasting = peak.gathered + activations
        kinds = dict(self.held)
        kinds["kept activations"] = activations
        kinds["gathered layers"] = peak.gathered
        kinds[TRANSIENT[phase]] = peak.nbytes - lasting
        present = {kind: size for kind, size in kinds.items() if size}
        if self.communicators is None:
            return PeakMemory(present, phase)
        total = sum(present.values())
        outside = outside_tensors(self.communicators, total, self.device)
        return PeakMemory(present, phase, outside)


def peak_memory(
    config: Config,
    world_size: int,
    rank: int = 0,
    device: TracedDevice = TracedDevice.CUDA,
) -> PeakMemory:
    """Count what ``rank`` holds at the peak of a step.

    Raises:
        UserError: the layout does not fit.
    """
    timeline = trace_step_memory(config, world_size, rank, device)
    return PeakMemory.of_timeline(timeline)


def trace_memory(config: Config, world_size: int, rank: int = 0) -> TracedMemory:
    """Trace one micro-batch of ``rank`` for what it holds: quicker than the whole step, and nearly as exact.

    Raises:
        UserError: the layout does not fit.
    """
    with built_rank(config, world_size, rank) as (grid, stages, optimizer):
        held = held_by_kind(stages, optimizer)
        held["pipeline buffers"] = _pipeline_buffers(config, stages)
        kept, peaks = _trace_step(config, stages, optimizer)
        micro_batches = micro_batches_in_flight(config, grid.pp.rank, grid.pp.size)
    return TracedMemory(held, kept, peaks, micro_batches, communicators(grid))


def _highest(peaks: Mapping[str, Peak]) -> str:
    """Return the phase with the highest peak, the first of equals."""
    return max(peaks, key=lambda phase: peaks[phase].nbytes)


def _pipeline_buffers(config: Config, stages: ModelStages) -> int:
    """Return the bytes that stages receive into, beside inputs of micro-batches in flight, which are activations."""
    schedule = stages.schedule
    if not isinstance(schedule, PipelineSchedule):
        return 0
    message = schedule.message_bytes(config.data.packed_length)
    # Of the next micro-batch a hidden state and a gradient; in a zero-bubble schedule
    # gradients also wait for the backward of weights.
    per_stage = 3 if pipeline_schedule(config) == "zbv" else 2
    messages = per_stage * len(stages.models)
    return messages * message


TRANSIENT = {
    "loss": "logits and gradient of the head",
    "backward": "gradients of a layer and buckets",
    "update": "buckets",
}


def held_by_kind(stages: ModelStages, optimizer: ZeroOptimizer) -> dict[str, int]:
    """Return the bytes that a rank holds during the whole step: weights, gradients, masters and moments."""
    gradients = 0
    for slot in optimizer.slots:
        gradients += slot.local.numel() * slot.gradient_dtype.itemsize
    masters = moments = 0
    for name, tensor in optimizer.state_tensors().items():
        if name.startswith("optim.master."):
            masters += local_bytes(tensor)
        else:
            moments += local_bytes(tensor)
    return {
        "weights": sum(map(local_bytes, stages.parameters().values())),
        "gradients": gradients,
        "masters": masters,
        "moments": moments,
    }


@dataclass(frozen=True)
class Peak:
    """Bytes alive at a peak, beyond what is held all the time; ``gathered`` of them are weights that FSDP2 gathered."""

    nbytes: int = 0
    gathered: int = 0

    def with_bytes(self, more: int) -> Peak:
        return Peak(self.nbytes + more, self.gathered)


def _trace_step(
    config: Config, stages: ModelStages, optimizer: ZeroOptimizer
) -> tuple[int, dict[str, Peak]]:
    """Run two micro-batches, of which the last launches buckets, and the update.

    The first one leaves what others find: gradients of float32 parameters, FSDP2's empty
    storages.

    Returns:
        the bytes of a micro-batch that are kept for backward, and the peak of each phase.
    """
    live = LiveBytes()
    kept: list[int] = []

    def end_of_forward(_: nn.Module, __: Any, hidden: Tensor) -> None:
        kept.append(live.alive.nbytes - live.alive.gathered)
        live.begin("loss")
        hidden.register_hook(lambda _: live.begin("backward"))  # type: ignore[no-untyped-call]

    hooks = [model.register_forward_hook(end_of_forward) for model in stages.models]
    schedule = stages.schedule
    run = schedule.train
    if isinstance(schedule, PipelineSchedule):
        run = schedule.rehearse
    batch = empty_batch(config, 1)
    terms = LossTerms.of(config.loss)
    with live.watching():
        optimizer.expect_micro_batches(2)
        run(batch, [1.0], terms, ignore_output)
        live.restart()
        kept.clear()
        live.begin("loss")
        run(batch, [1.0], terms, ignore_output)
        live.begin("update")
        optimizer.communicate_only()
    for hook in hooks:
        hook.remove()
    return max(kept), live.peaks


class LiveBytes(StorageWatch):
    """Counts the bytes of tensors that come to life on a device, and the peak of each phase."""

    def __init__(
        self,
        device: TracedDevice = TracedDevice.CUDA,
    ) -> None:
        super().__init__()
        self._device = device.value
        self.alive = Peak()
        self.peaks: dict[str, Peak] = {}
        self._phase = ""
        self._sizes: dict[int, int] = {}  # of storages, by address
        self._gathers: set[int] = set()

    def begin(self, phase: str) -> None:
        """Attribute peaks to ``phase`` from here on."""
        self._phase = phase
        self._note_peak()

    def restart(self) -> None:
        """Forget the peaks, and count from what is alive now."""
        self.alive = Peak()
        self.peaks = {}

    def made(self, tensor: Tensor, operator: Any) -> None:
        if tensor.device.type == self._device:
            self._count(tensor.untyped_storage())

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that FSDP2 gathers into, or has emptied."""
        self._gathers.add(storage._cdata)
        self._count(storage)

    def freed(self, key: int) -> None:
        self._resize(key, 0)
        del self._sizes[key]
        self._gathers.discard(key)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = self.watch(storage)
        size = storage.nbytes()
        self._resize(key, size)
        self._note_peak()

    def _resize(self, key: int, size: int) -> None:
        growth = size - self._sizes.get(key, 0)
        self._sizes[key] = size
        gathered = growth if key in self._gathers else 0
        self.alive = Peak(self.alive.nbytes + growth, self.alive.gathered + gathered)

    def _note_peak(self) -> None:
        highest = self.peaks.get(self._phase, Peak(-1))
        if self.alive.nbytes > highest.nbytes:
            self.peaks[self._phase] = self.alive


def micro_batches_in_flight(config: Config, rank: int, pp: int) -> int:
    """Return of how many micro-batches a rank of a pipeline keeps activations at one time, for all its stages."""
    if pp == 1:
        return 1
    kind = pipeline_schedule(config)
    chunks = config.model.num_chunks
    num_stages = pp * chunks
    if kind == "1f1b":
        in_flight = num_stages - rank
    else:
        # Interleaved: the warm-up of torch's schedule, and the micro-batch after it. In a
        # V every rank keeps as many as the first one of 1F1B.
        in_flight = 0
        for stage in stages_of_rank(rank, pp, chunks, kind):
            in_flight = max(in_flight, num_stages - stage)
    return max(min(in_flight, config.data.micro_num * chunks), 1)


def local_bytes(tensor: Tensor) -> int:
    """Return the bytes of what this rank has of a tensor."""
    shard = local_shard(tensor)
    return shard.numel() * shard.element_size()
