"""Memory and time of thousands of layouts by arithmetic, from the parts of a few traced models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from evomesh.config.schema import Config
from evomesh.models.registry import model_initializer
from evomesh.plan.bucket_time import (
    gather_buckets,
    sum_buckets,
    sums_end,
    update_seconds,
)
from evomesh.plan.device import Device
from evomesh.plan.layout_choice import LayoutChoice, with_choice
from evomesh.plan.layout_sizes import LayoutSizes
from evomesh.plan.memory import (
    GIB,
    Peak,
    PeakMemory,
    TracedMemory,
    micro_batches_in_flight,
)
from evomesh.plan.part_library import PartLibrary
from evomesh.plan.part_time import SHARDS, TransferSeconds
from evomesh.plan.part_trace import ShardShape, SlotShape
from evomesh.plan.pipeline_time import StageSeconds
from evomesh.plan.rank_state import RankMakeup, RankState
from evomesh.plan.stage_parts import (
    StageBytes,
    StageMakeup,
    StageTimes,
    highest,
    stage_bytes,
)
from evomesh.plan.stage_shape import PipelineShape, StageShape
from evomesh.plan.step_time import RankSeconds, StepTime, combine, traced_device
from evomesh.train.stages import end_weights


@dataclass
class _Found:
    """Stages and ranks that were computed before."""

    times: dict[object, StageTimes] = field(default_factory=dict)
    lasts: dict[object, float] = field(default_factory=dict)
    nbytes: dict[object, StageBytes] = field(default_factory=dict)
    states: dict[object, RankState] = field(default_factory=dict)


class PartsPredictor:
    """Predicts layouts of one config on one device.

    Attributes:
        capacity: bytes of one device.
        library: has traced what the predictions so far are made of.
    """

    def __init__(self, config: Config, world_size: int, device: Device) -> None:
        self.config = config
        self.world_size = world_size
        self.device = device
        self.capacity = int(device.memory_gib * GIB)
        self.library = PartLibrary(config, device)
        self._found = _Found()

    @cached_property
    def _rounds_up(self) -> bool:
        builder = model_initializer.get_module(self.config.model.model_type)
        family = getattr(builder, "keywords", {}).get("family")
        return family is not None and family.recompute_rounding == "ceil"

    def sizes(self, choice: LayoutChoice) -> LayoutSizes:
        return LayoutSizes(choice, self.world_size, self.device.gpus_per_node)

    def peak(self, choice: LayoutChoice) -> PeakMemory:
        """Return the most memory of any rank."""
        config = with_choice(self.config, choice)
        peaks = []
        for rank in self._different_ranks(choice):
            traced = self._rank_memory(config, choice, rank)
            peaks.append(traced.peak())
        return max(peaks, key=lambda peak: peak.needed)

    def step_time(self, choice: LayoutChoice) -> StepTime:
        """Return the time of a step, in the order of the pipeline's schedule."""
        config = with_choice(self.config, choice)
        like = {}
        for rank in self._different_ranks(choice):
            kind = self._kind(choice, rank)
            like[kind] = self._rank_seconds(choice, rank)
        ranks = []
        pipeline = self._pipeline(choice)
        for shapes in pipeline.rank_stages():
            kind = tuple(shapes.values())
            own = _renumbered(like[kind], shapes)
            ranks.append(own)
        return combine(
            ranks,
            config,
            self.world_size,
            self.device,
        )

    def least_seconds(self, choice: LayoutChoice) -> float:
        """Return a bound of the time of a step from below; without a pipeline, its time.

        A rank computes all its micro-batches after the first one has come to it and before
        the last one has gone back to the first stage.
        """
        last = 0.0
        for rank in self._different_ranks(choice):
            seconds = self._last_seconds(choice, rank)
            last = max(last, seconds)
        to_come = 0.0
        longest = 0.0
        for rank in range(choice.pipeline):
            stages = []
            for stage in self._kind(choice, rank):
                times = self._stage_times(choice, stage)
                stages.append(times.forward + times.backward)
            computing = choice.micro_num * sum(stages)
            longest = max(longest, to_come + computing)
            to_come += stages[0]
        return longest + last

    def _pipeline(self, choice: LayoutChoice) -> PipelineShape:
        model = self.config.model
        pipeline = self.config.parallel.pipeline
        schedule = pipeline.schedule
        if schedule is None:
            schedule = "interleaved" if choice.chunks > 1 else "1f1b"
        return PipelineShape(
            num_layers=model.num_layers,
            ranks=choice.pipeline,
            chunks=choice.chunks,
            schedule=schedule,
            ends=end_weights(model) if pipeline.balance else None,
            recompute=choice.recompute,
            rounds_up=self._rounds_up,
        )

    def _kind(self, choice: LayoutChoice, rank: int) -> tuple[StageShape, ...]:
        stages = self._pipeline(choice).rank_stages()[rank]
        return tuple(stages.values())

    def _different_ranks(self, choice: LayoutChoice) -> list[int]:
        """Return the first rank of each kind, which has the most micro-batches in flight."""
        return self._pipeline(choice).different_ranks()

    def _rank_makeup(self, choice: LayoutChoice, rank: int) -> RankMakeup:
        sizes = self.sizes(choice)
        shape = sizes.shard_shape()
        pipeline = self._pipeline(choice)
        ranks = pipeline.rank_stages()
        shapes = ranks[rank]
        stages = {}
        for number, stage in shapes.items():
            makeup = self.library.makeup(shape, stage)
            stages[number] = makeup
        tied: list[SlotShape] = []
        if self.config.model.tie_word_embeddings:
            tied = _tied_at_end(shapes, stages)
        return RankMakeup(stages, tied, sizes.state_axes)

    def _rank_memory(
        self, config: Config, choice: LayoutChoice, rank: int
    ) -> TracedMemory:
        shape = self.sizes(choice).shard_shape()
        kind = self._kind(choice, rank)
        state = self._rank_state(choice, rank)
        found = []
        for stage_shape in kind:
            stage = self._stage_bytes(shape, stage_shape)
            found.append(stage)

        # 1. Sums of buckets are kept from when they are launched to the update.
        in_backward: list[Peak] = []
        for stage in reversed(found):
            for peak in stage.backward:
                part = len(in_backward)
                sums = state.sums_in(part)
                in_backward.append(peak.with_bytes(sums))

        # 2. Between stages.
        held = dict(state.held)
        if choice.pipeline > 1:
            held["pipeline buffers"] = self._pipeline_buffers(choice, len(kind))
        return TracedMemory(
            held=held,
            kept=max(stage.kept for stage in found),
            peaks={
                "loss": highest([stage.forward for stage in found]),
                "backward": highest(in_backward),
                "update": Peak(state.update),
            },
            micro_batches=micro_batches_in_flight(config, rank, choice.pipeline),
            communicators=self.sizes(choice).communicators,
            device=traced_device(self.device),
        )

    def _stage_bytes(self, shape: ShardShape, stage: StageShape) -> StageBytes:
        key = (shape, stage)
        found = self._found.nbytes
        if key not in found:
            makeup = self.library.makeup(shape, stage)
            found[key] = stage_bytes(makeup)
        return found[key]

    def _rank_state(self, choice: LayoutChoice, rank: int) -> RankState:
        """Return what a rank's optimizer holds, which neither recomputing nor the micro-batches change."""
        usual = self.config.data.micro_bsz
        plain = replace(choice, recompute=0.0, micro_bsz=usual)
        sizes = self.sizes(plain)
        key = (
            sizes.shard_shape(),
            sizes.state_axes,
            self._kind(plain, rank),
        )
        found = self._found.states
        if key not in found:
            makeup = self._rank_makeup(choice, rank)
            zero = self.config.hybrid_zero_optimizer
            found[key] = RankState.of(makeup, zero)
        return found[key]

    def _pipeline_buffers(self, choice: LayoutChoice, stages: int) -> int:
        """Return the bytes into which stages receive: every mode sends a share of the hidden states."""
        model = self.config.model
        tokens = choice.micro_bsz * self.config.data.seq_len
        itemsize = 2
        if model.residual_in_fp32 or model.dtype.endswith("32"):
            itemsize = 4
        elements = tokens * model.hidden_size // choice.tensor
        # Of the next micro-batch a hidden state and a gradient, and in zbv one more.
        messages = 2 * stages
        if self.config.parallel.pipeline.schedule == "zbv":
            messages = 3 * stages
        return messages * elements * itemsize

    def _rank_seconds(self, choice: LayoutChoice, rank: int) -> RankSeconds:
        stages = {}
        exposed = 0.0
        busy: dict[str, float] = {}
        micro_batch = 0.0
        pipeline = self._pipeline(choice)
        own = pipeline.rank_stages()[rank]
        for number, stage in own.items():
            times = self._stage_times(choice, stage)
            stages[number] = StageSeconds(times.forward, times.backward)
            micro_batch += times.forward
            micro_batch += times.backward
            exposed += times.exposed
            for kind, seconds in times.busy.items():
                before = busy.get(kind, 0.0)
                busy[kind] = before + seconds
        return RankSeconds(
            stages=stages,
            micro_batch=micro_batch,
            exposed=exposed,
            last=self._last_seconds(choice, rank),
            busy=busy,
        )

    def _stage_times(self, choice: LayoutChoice, stage: StageShape) -> StageTimes:
        sizes = self.sizes(choice)
        shape = sizes.shard_shape()
        places = sizes.placements()
        key = (
            shape,
            stage,
            places["tp"],
            places[SHARDS],
        )
        found = self._found.times
        if key not in found:
            makeup = self.library.makeup(shape, stage)
            seconds = self._transfer_seconds(sizes)
            found[key] = StageTimes.of(makeup, seconds)
        return found[key]

    def _last_seconds(self, choice: LayoutChoice, rank: int) -> float:
        """Return how much longer the last micro-batch is, with sums, update and gathers."""
        sizes = self.sizes(choice)
        key = (
            sizes.shard_shape(),
            sizes.state_axes,
            self._kind(choice, rank),
            choice.pipeline,
        )
        found = self._found.lasts
        if key not in found:
            makeup = self._rank_makeup(choice, rank)
            found[key] = self._compute_last(makeup, choice, rank)
        return found[key]

    def _compute_last(
        self, makeup: RankMakeup, choice: LayoutChoice, rank: int
    ) -> float:
        zero = self.config.hybrid_zero_optimizer
        seconds = self._transfer_seconds(self.sizes(choice))
        # 1. Sums, of which some end before backward does.
        ends = []
        start = 0.0
        stages = self._kind(choice, rank)
        for stage in reversed(stages):
            times = self._stage_times(choice, stage)
            for end in times.backward_ends:
                ends.append(start + end)
            start += times.backward
        axes = makeup.axes
        ready = makeup.in_backward(ends)
        buckets = sum_buckets(ready, axes, zero.reduce_bucket_size)
        summed = sums_end(
            buckets,
            start,
            zero.overlap_sync_grad,
            seconds,
        )

        # 2. The update, then the gathers.
        state = self._rank_state(choice, rank)
        last = summed - start
        last += update_seconds(state.held, self.device)
        slots = makeup.slots()
        for gather in gather_buckets(slots, axes, zero):
            last += gather.seconds(self.device, seconds)
        return last

    def _transfer_seconds(self, sizes: LayoutSizes) -> TransferSeconds:
        places = sizes.placements()
        device = self.device

        def seconds(operation: str, axis: str, nbytes: int) -> float:
            place = places[axis]
            return device.transfer_seconds(operation, nbytes, place.ranks, place.nodes)

        return seconds


def _renumbered(seconds: RankSeconds, shapes: Mapping[int, StageShape]) -> RankSeconds:
    """Return the times of a rank for another one of its kind, whose stages have other numbers."""
    pairs = zip(shapes, seconds.stages.values(), strict=True)
    return replace(seconds, stages=dict(pairs))


def _tied_at_end(
    shapes: Mapping[int, StageShape], stages: Mapping[int, StageMakeup]
) -> list[SlotShape]:
    """Return the tied embedding of a rank that has the end of the model, for the head, but not the start."""
    positions = shapes.values()
    if any(shape.is_first for shape in positions):
        return []
    tied = []
    for number, shape in shapes.items():
        if not shape.is_last:
            continue
        for slot in stages[number].end.slots:
            if slot.part == "start":
                tied.append(slot)
    return tied
