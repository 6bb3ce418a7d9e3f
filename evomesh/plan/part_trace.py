"""Traces of small models, divided into the parts of which a rank of any depth is made.

Layouts whose ranks hold tensors of the same shapes share a trace. It has the parts

    F start   F layer 0   F layer 1   ...   F end   F loss
    B start   B layer 0   B layer 1   ...   B end

where start is the embedding, or what arrives from the stage before; end is the last norm,
loss the head, or what goes to the next stage. Of each part it has the events, and the
bytes that are alive when it begins and at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.layers.block_softmax import LossTerms
from evomesh.optim.slot import ParameterSlot
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.spec import optimizer_axes, spec_of
from evomesh.pipeline.schedule import PipelineSchedule
from evomesh.plan.layout_choice import LayoutChoice, Mode, with_choice
from evomesh.plan.memory import LiveBytes, Peak, local_bytes
from evomesh.plan.timeline import Event, RecordedStreams, Timeline, TimelineRecorder
from evomesh.plan.trace import (
    TracedDevice,
    built_rank,
    empty_batch,
    host_batch,
    ignore_output,
)

F_START = "F start"
F_END = "F end"
F_LOSS = "F loss"
B_START = "B start"
B_END = "B end"


def forward_of(layer: int) -> str:
    """Return the name of the part in which a layer of the traced model goes forward."""
    return f"F layer {layer}"


def backward_of(layer: int) -> str:
    """Return the name of the part in which a layer goes backward."""
    return f"B layer {layer}"


@dataclass(frozen=True)
class ShardShape:
    """Sizes that the shapes of a rank's tensors depend on.

    Attributes:
        shards: ranks over which FSDP2 shards weights: of the weight axis in isp, else of the zero axis; 1 without.
        depth: layers of the traced stage.
        is_middle: a stage in the middle of a pipeline; else the whole model.
    """

    mode: Mode
    tensor: int
    shards: int
    micro_bsz: int
    recompute: bool
    depth: int
    is_middle: bool


@dataclass(frozen=True)
class SlotShape:
    """A parameter as this rank's optimizer sees it, before its state is sharded.

    Attributes:
        part: "start", "end", or the number of its layer.
        elements, rows: of this rank's shard of the weights.
        gradient: bytes of one element of the gradient, and of the master if there is one.
        moments: bytes that the update rule keeps.
        is_scattered: FSDP2 has sharded it over the zero axis.
        is_split: FSDP2 has sharded it, over any axis.
        inner: the axis, tp or wp, that shards or replicates the weight itself; see ``optimizer_axes``.
        is_summed_inside: its gradient is a partial sum over that axis too.
    """

    part: str
    elements: int
    rows: int
    is_matrix: bool
    itemsize: int
    gradient: int
    is_half: bool
    moments: int
    is_scattered: bool
    is_split: bool
    inner: str
    is_summed_inside: bool


@dataclass(frozen=True)
class PartBytes:
    """Bytes of a part.

    Attributes:
        kept: what a part of forward keeps for backward.
        most: the most that is alive in it, beyond what is kept when it begins: by the parts of forward before it, or
            before the end of backward's counterpart. Gathered weights are never kept.
    """

    kept: int
    most: Peak


@dataclass(frozen=True)
class PartTrace:
    """Events and bytes of the parts of a small model, and its parameters.

    Attributes:
        order: names of the parts as they were launched.
        marks: how many marks there were before each part.
        message: bytes that stages send each other.
    """

    order: list[str]
    events: dict[str, list[Event]]
    marks: dict[str, int]
    nbytes: dict[str, PartBytes]
    slots: list[SlotShape]
    message: int


def trace_parts(
    config: Config, shape: ShardShape, device: TracedDevice = TracedDevice.CUDA
) -> PartTrace:
    """Trace one micro-batch of a rank.

    Raises:
        UserError: the model has no layers that differ.
    """
    small, world_size, rank = small_world(config, shape)
    timeline = Timeline()
    streams = RecordedStreams(timeline)
    build = built_rank(small, world_size, rank, streams.interface(), device)
    with build as (grid, stages, optimizer):
        model = stages.models[0]
        schedule = stages.schedule
        run = schedule.train
        message = 0
        if isinstance(schedule, PipelineSchedule):
            run = schedule.rehearse
            message = schedule.message_bytes(small.data.packed_length)
        make_batch = host_batch if device is TracedDevice.CPU else empty_batch
        batch = make_batch(small, 1)
        terms = LossTerms.of(small.loss)
        # Buckets are launched in the last micro-batch, which is none of these.
        optimizer.expect_micro_batches(3)

        marks: dict[str, int] = {}
        live = _PartBytesCount(device)

        def begin(part: str) -> None:
            marks[part] = timeline.marks
            timeline.begin(part)
            live.begin_part(part)

        if shape.shards > 1 or not all(slot.is_half for slot in optimizer.slots):
            # What the first micro-batch leaves: gradients of float32 parameters, FSDP2's
            # empty storages.
            run(batch, [1.0], terms, ignore_output)
            timeline.restart()
        recorder = TimelineRecorder(timeline, streams, grid, device.value)
        with _parts(model, begin), live.watching(), recorder:
            begin(F_START)
            run(batch, [1.0], terms, ignore_output)
        events = _events_by_part(timeline)
        order = [name for name, _ in timeline.sections]
        slots = _slot_shapes(optimizer)
    return PartTrace(
        order=order,
        events=events,
        marks=marks,
        nbytes=live.by_part(),
        slots=slots,
        message=message,
    )


def small_world(config: Config, shape: ShardShape) -> tuple[Config, int, int]:
    """Return a config of a model with these shapes, the smallest world that has them, and a rank of it."""
    pipeline = 3 if shape.is_middle else 1
    is_isp = shape.mode == "isp"
    weight = shape.shards if is_isp else 1
    ranks = math.lcm(shape.tensor, weight)
    zero = 1
    if not is_isp:
        zero = shape.shards
        ranks *= zero
    layout = LayoutChoice(
        mode=shape.mode,
        tensor=shape.tensor,
        weight=weight,
        pipeline=pipeline,
        chunks=1,
        zero=zero,
        fsdp=zero > 1,
        recompute=float(shape.recompute),
        micro_bsz=shape.micro_bsz,
        micro_num=1,
    )
    changed = with_choice(config, layout)
    layers = shape.depth * pipeline
    model = changed.model.model_copy(update={"num_layers": layers})
    stages = changed.parallel.pipeline.model_copy(
        update={"schedule": None, "balance": False}
    )
    parallel = changed.parallel.model_copy(update={"pipeline": stages})
    small = changed.model_copy(update={"model": model, "parallel": parallel})
    rank = ranks if shape.is_middle else 0
    return small, ranks * pipeline, rank


def _events_by_part(timeline: Timeline) -> dict[str, list[Event]]:
    """Return the events of each part without the transfers between stages."""
    ends = [start for _, start in timeline.sections[1:]]
    ends.append(len(timeline.events))
    found = {}
    for (name, start), end in zip(timeline.sections, ends, strict=True):
        found[name] = [
            event
            for event in timeline.events[start:end]
            if not is_between_stages(event)
        ]
    return found


class _PartBytesCount(LiveBytes):
    """Counts the bytes that are alive when each part begins, and the peak in it."""

    def __init__(self, device: TracedDevice) -> None:
        super().__init__(device)
        self._before: dict[str, Peak] = {}

    def begin_part(self, part: str) -> None:
        self._before[part] = self.alive
        self.begin(part)

    def by_part(self) -> dict[str, PartBytes]:
        """Return the bytes of each part, beyond what was kept before it."""
        order = list(self._before)
        forward = [part for part in order if part.startswith("F ")]
        found = {}
        for part, following in pairwise(forward):
            kept = _net(self._before[following]) - _net(self._before[part])
            most = self._beyond(part, part)
            found[part] = PartBytes(kept, most)
        for part in order:
            if part in found:
                continue
            reference = part
            if part != F_LOSS:
                reference = kept_before(part, forward)
            most = self._beyond(part, reference)
            found[part] = PartBytes(0, most)
        return found

    def _beyond(self, part: str, reference: str) -> Peak:
        most = self.peaks[part]
        kept = _net(self._before[reference])
        return Peak(most.nbytes - kept, most.gathered)


def kept_before(backward: str, forward: Sequence[str]) -> str:
    """Return the part of forward when which begins there is kept what a part of backward still needs, and no more."""
    if backward == B_START:
        return F_START
    if backward == B_END:
        return F_LOSS
    own = forward.index(backward.replace("B ", "F "))
    return forward[own + 1]


def _net(peak: Peak) -> int:
    """Return what is alive without gathered weights."""
    return peak.nbytes - peak.gathered


@contextmanager
def _parts(model: nn.Module, begin: Callable[[str], None]) -> Iterator[None]:
    """Call ``begin`` with the name of each part of a micro-batch but the first, in the ``with`` block."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleDict | nn.ModuleList) or not len(layers):
        raise UserError(
            f"{type(model).__name__} has no layers",
            code="EVO-PARALLEL-008",
            where="--search",
            expected="a model with its blocks in self.layers, an nn.ModuleDict or nn.ModuleList",
        )
    blocks = list(layers.values() if isinstance(layers, nn.ModuleDict) else layers)
    hooks = _PartHooks(begin, blocks[-1])
    handles: list[RemovableHandle] = []
    for number, block in enumerate(blocks):
        before = partial(hooks.before_layer, number)
        after = partial(hooks.after_layer, number)
        # Before FSDP2 waits for the weights.
        handles.append(block.register_forward_pre_hook(before, prepend=True))
        handles.append(block.register_forward_hook(after))
    handles.append(model.register_forward_hook(hooks.after_model))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _PartHooks:
    """Hooks of a model and its blocks that begin parts; a recomputed forward belongs to its backward."""

    begin: Callable[[str], None]
    last: nn.Module
    output: list[Tensor] = field(default_factory=list)

    def before_layer(self, number: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        if _is_in_backward():
            return
        self.begin(forward_of(number))
        if number == 0 and args[0].requires_grad:
            self._begin_at_gradient(args[0], B_START)

    def after_layer(self, number: int, block: nn.Module, _: Any, out: Tensor) -> None:
        if _is_in_backward():
            return
        self._begin_at_gradient(out, backward_of(number))
        if block is self.last:
            self.begin(F_END)
            self.output[:] = [out]

    def after_model(self, _: nn.Module, __: Any, hidden: Tensor) -> None:
        self.begin(F_LOSS)
        (out,) = self.output
        # Without a norm its gradient begins the last layer.
        if hidden is not out:
            self._begin_at_gradient(hidden, B_END)
        self.output.clear()

    def _begin_at_gradient(self, tensor: Tensor, part: str) -> None:
        tensor.register_hook(lambda _: self.begin(part))  # type: ignore[no-untyped-call]


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _slot_shapes(optimizer: ZeroOptimizer) -> list[SlotShape]:
    moments: dict[str, int] = {}
    state = optimizer.state_tensors()
    for key, tensor in state.items():
        _, kind, name = key.split(".", 2)
        if kind == "master":
            continue
        before = moments.get(name, 0)
        moments[name] = before + local_bytes(tensor)
    # A stage in the middle begins with another layer than the first.
    layers = []
    for slot in optimizer.slots:
        layer = _layer_of(slot.name)
        if layer >= 0:
            layers.append(layer)
    first = min(layers)
    shapes = []
    for slot in optimizer.slots:
        shape = _slot_shape(slot, moments, optimizer, first)
        shapes.append(shape)
    return shapes


def _layer_of(name: str) -> int:
    """Return the number in the name of a parameter; -1 for one outside the layers."""
    if not name.startswith("layers."):
        return -1
    return int(name.split(".")[1])


def _slot_shape(
    slot: ParameterSlot,
    moments: dict[str, int],
    optimizer: ZeroOptimizer,
    first_layer: int,
) -> SlotShape:
    spec = spec_of(slot.param)
    zero, _, inner = optimizer_axes(spec, optimizer.grid)
    axes = {axis for axis, _ in spec.shards}
    local = slot.local
    # In the traced world only FSDP2 may have a zero axis; a matrix that it leaves whole
    # has a share of the state there.
    shares = slot.shard_axis.size
    name = slot.name
    part = "end"
    layer = _layer_of(name)
    if layer >= 0:
        part = str(layer - first_layer)
    elif name.startswith("embedding."):
        part = "start"
    return SlotShape(
        part=part,
        elements=local.numel(),
        rows=local.shape[0],
        is_matrix=local.dim() > 1,
        itemsize=local.element_size(),
        gradient=slot.gradient_dtype.itemsize,
        is_half=slot.is_half,
        moments=moments.get(name, 0) * shares,
        is_scattered=zero.name in axes,
        is_split=zero.name in axes or "wp" in axes,
        inner=inner.name,
        is_summed_inside=inner.size > 1 and inner.name in spec.partial,
    )


def is_between_stages(event: Event) -> bool:
    """Return whether an event is a transfer between stages of a pipeline, which its schedule times."""
    call = getattr(event, "call", None)
    return call is not None and call.axis == "pp"


def shape_period(config: Config) -> int:
    """Return after how many layers their kinds repeat: windows, and which layers rotate."""
    model = config.model
    kinds = []
    for layer in range(model.num_layers):
        window = model.window_of(layer)
        rotates = model.rotates(layer)
        base = model.uses_local_rope_base(layer)
        kinds.append((window, rotates, base))
    for period in range(1, len(kinds)):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return period
    return len(kinds)
