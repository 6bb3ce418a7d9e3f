"""Most memory of a rank in a step: the tensors of a real step on the meta device are counted.

The meta device stands for CUDA: shapes and dtypes are those of its kernels, nothing is
computed. A step has three phases, whose peaks differ by what is alive:

    loss        kept activations, a chunk of logits, the gradient of the head
    backward    ever fewer activations; gathered and recomputed layers, gradients, sums of buckets
    update      sums of buckets, gathered parameters

What is alive in all of them (weights, gradients, masters, moments) is counted once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evomesh.config.layout import pipeline_schedule
from evomesh.config.schema import Config
from evomesh.layers.loss import LossTerms
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import local_shard
from evomesh.pipeline.schedule import PipelineSchedule
from evomesh.pipeline.stages import stages_of_rank
from evomesh.plan.trace import built_rank, empty_batch
from evomesh.train.stages import ModelStages

GIB = 2**30
# Of a GPU's memory: the context of CUDA, libraries' workspaces, NCCL's buffers, and the
# allocator's rounding.
RESERVED = 2 * GIB


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one rank when most of them are in use.

    Attributes:
        kinds: bytes by kind, at the peak; they add up to ``total``.
        phase: "loss", "backward" or "update", which has the peak.
    """

    kinds: dict[str, int]
    phase: str

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def missing(self, capacity: int) -> int:
        """Return the bytes that a GPU of ``capacity`` bytes lacks; 0 or less where the step fits."""
        return self.total + RESERVED - capacity


def peak_memory(config: Config, world_size: int, rank: int = 0) -> PeakMemory:
    """Count what ``rank`` holds at the peak of a step.

    Raises:
        UserError: the layout does not fit.
    """
    with built_rank(config, world_size, rank) as (grid, stages, optimizer):
        held = held_by_kind(stages, optimizer)
        phases = _phase_peaks(config, stages, optimizer)
        depth = _micro_batches_in_flight(config, grid.pp)
    # Of the micro-batches that a pipeline keeps, the trace had one.
    kept = phases.kept * depth
    more_kept = kept - phases.kept
    transient = {
        "loss": phases.loss + more_kept - kept,
        "backward": phases.backward + more_kept - kept,
        "update": phases.update,
    }
    alive = {"loss": kept, "backward": kept, "update": 0}
    phase = max(alive, key=lambda name: alive[name] + transient[name])
    kinds = {**held, "kept activations": alive[phase]}
    kinds[TRANSIENT[phase]] = transient[phase]
    if grid.pp.size > 1:
        kinds["pipeline buffers"] = _pipeline_buffers(config, stages, depth)
    return PeakMemory(kinds, phase)


TRANSIENT = {
    "loss": "logits and gradient of the head",
    "backward": "gathered layers, gradients and buckets",
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
            masters += _nbytes(tensor)
        else:
            moments += _nbytes(tensor)
    return {
        "weights": sum(map(_nbytes, stages.parameters().values())),
        "gradients": gradients,
        "masters": masters,
        "moments": moments,
    }


@dataclass(frozen=True)
class _PhasePeaks:
    """Bytes beyond what is held all the time: at the end of forward, and the peak of each phase."""

    kept: int
    loss: int
    backward: int
    update: int


def _phase_peaks(
    config: Config, stages: ModelStages, optimizer: ZeroOptimizer
) -> _PhasePeaks:
    """Run the last micro-batch of a step, in which buckets are launched, and the update, and count."""
    live = LiveBytes(_gradients_in_place(optimizer))
    kept: list[int] = []

    def end_of_forward(_: nn.Module, __: Any, hidden: Tensor) -> None:
        kept.append(live.current)
        live.begin("loss")
        if hidden.requires_grad:
            hidden.register_hook(lambda _: live.begin("backward"))

    hooks = [model.register_forward_hook(end_of_forward) for model in stages.models]
    schedule = stages.schedule
    is_pipeline = isinstance(schedule, PipelineSchedule)
    run = schedule.rehearse if isinstance(schedule, PipelineSchedule) else schedule.train
    with live.counted():
        live.begin("forward")
        optimizer.expect_micro_batches(1)
        run(
            empty_batch(config, 1),
            [1.0],
            LossTerms.of(config.loss),
            lambda index, output: None,
        )
        live.begin("update")
        optimizer.communicate_only()
    for hook in hooks:
        hook.remove()
    del is_pipeline
    peaks = live.peaks
    return _PhasePeaks(
        max(kept),
        max(peaks["forward"], peaks["loss"]),
        peaks.get("backward", 0),
        peaks["update"],
    )


def _gradients_in_place(optimizer: ZeroOptimizer) -> int:
    """Return the bytes of gradients that only exist from backward on: those of wide parameters."""
    wide = [slot for slot in optimizer.slots if slot.accumulated_grad is None]
    return sum(slot.local.numel() * slot.gradient_dtype.itemsize for slot in wide)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that come to life on the meta device, and the peak of each phase.

    Args:
        expected: bytes that come to life but are counted elsewhere.
    """

    def __init__(self, expected: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peaks: dict[str, int] = {}
        self._phase = ""
        self._sizes: dict[int, int] = {}
        self._expected = expected

    def begin(self, phase: str) -> None:
        """Attribute peaks to ``phase`` from here on."""
        self._phase = phase
        self._note_peak()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count in the ``with`` block, resized storages included: FSDP2 gathers into those."""
        resize = torch.UntypedStorage.resize_

        def counted_resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._count(storage)
            return result

        with patch.object(torch.UntypedStorage, "resize_", counted_resize), self:
            yield

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        existing = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                storage = leaf.untyped_storage()
                if storage._cdata not in existing:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        size = storage.nbytes()
        self.current += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self._note_peak()

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key, 0)

    def _note_peak(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.current)


def _micro_batches_in_flight(config: Config, pp: Axis) -> int:
    """Return of how many micro-batches a rank keeps activations at one time, for all its stages together."""
    if pp.size == 1:
        return 1
    kind = pipeline_schedule(config)
    chunks = config.model.num_chunks
    num_stages = pp.size * chunks
    if kind == "1f1b":
        in_flight = num_stages - pp.rank
    else:
        # Interleaved: the warm-up of torch's schedule, and the micro-batch after it. In a
        # V every rank keeps as many as the first one of 1F1B.
        in_flight = 0
        for stage in stages_of_rank(pp.rank, pp.size, chunks, kind):
            in_flight = max(in_flight, num_stages - stage)
    return max(min(in_flight, config.data.micro_num * chunks), 1)


def _pipeline_buffers(config: Config, stages: ModelStages, depth: int) -> int:
    """Return the bytes that torch's stages receive into: hidden states, and their gradients, of each micro-batch."""
    assert isinstance(stages.schedule, PipelineSchedule)
    message = stages.schedule.message_bytes(config.data.packed_length)
    del depth
    return 2 * len(stages.models) * config.data.micro_num * message


def _nbytes(tensor: Tensor) -> int:
    shard = local_shard(tensor)
    return shard.numel() * shard.element_size()
