"""The parts that layouts are made of, traced once for each shape and timed for a device."""

from __future__ import annotations

from dataclasses import replace

from evomesh.config.schema import Config
from evomesh.plan.device import Device
from evomesh.plan.part_fit import (
    FOUR,
    TWO,
    bytes_at,
    moved_bytes,
    moved_part,
    parts_at,
    slots_at,
)
from evomesh.plan.part_time import time_parts
from evomesh.plan.part_trace import ShardShape, shape_period, trace_parts
from evomesh.plan.stage_parts import LayerPart, ShardParts, StageMakeup
from evomesh.plan.stage_shape import StageShape
from evomesh.plan.step_time import traced_device


class PartLibrary:
    """Makes stages of traced parts, and remembers what it has traced.

    Attributes:
        num_traces: how many models it has traced.
    """

    def __init__(self, config: Config, device: Device) -> None:
        self.num_traces = 0
        self._config = config
        self._device = device
        self._period = shape_period(config)
        self._parts: dict[ShardShape, ShardParts] = {}
        self._makeups: dict[object, StageMakeup] = {}

    def makeup(self, shape: ShardShape, stage: StageShape) -> StageMakeup:
        """Return what a stage is made of.

        Args:
            shape: of its tensors; depth, recomputing and position are those of ``stage``.
        """
        key = (shape, stage)
        if key not in self._makeups:
            self._makeups[key] = self._make(shape, stage)
        return self._makeups[key]

    def _make(self, shape: ShardShape, stage: StageShape) -> StageMakeup:
        depth = self._traced_depth(shape, stage.layers)
        whole = replace(shape, depth=depth, is_middle=False)
        middle = replace(shape, depth=depth, is_middle=True)
        body = whole
        if shape.shards == 1:
            # Whole weights need no gathers: a layer is like those of other stages.
            middle = replace(middle, depth=1)
        elif not (stage.is_first or stage.is_last):
            body = middle
        of_start = whole if stage.is_first else middle
        of_end = whole if stage.is_last else middle
        layers = []
        for layer in range(stage.layers):
            is_recomputed = layer < stage.recomputed
            of_layer = replace(body, recompute=is_recomputed)
            source = self.parts(of_layer)
            number = self._like(shape, layer, stage.layers)
            layers.append(LayerPart(source, number))
        return StageMakeup(
            start=self.parts(of_start),
            layers=tuple(layers),
            end=self.parts(of_end),
        )

    def _traced_depth(self, shape: ShardShape, layers: int) -> int:
        """Return how many layers show all that a stage has: the first ones and the last one differ."""
        leading = _leading(shape)
        enough = leading + self._period + 1
        if self._period == 1 and layers > leading:
            # A stage without layers in the middle shares the trace that has one.
            return enough
        return min(layers, enough)

    def _like(self, shape: ShardShape, layer: int, layers: int) -> int:
        """Return the traced layer that does what ``layer`` does."""
        depth = self._traced_depth(shape, layers)
        leading = _leading(shape)
        if layer < leading:
            return layer
        if layer == layers - 1:
            return depth - 1
        between = layer - leading
        return leading + between % self._period

    def parts(self, shape: ShardShape) -> ShardParts:
        """Return the parts of a shape: traced, or for sharded weights derived from fewer traces.

        The tokens of the config and no recomputing are traced with weights sharded over 2
        and 4 ranks; other numbers are on their line, and what else a layer computes is
        added as it is with whole weights.
        """
        if shape not in self._parts:
            self._parts[shape] = self._find(shape)
        return self._parts[shape]

    def _find(self, shape: ShardShape) -> ShardParts:
        if shape.shards == 1:
            return self._trace(shape)
        usual = self._config.data.micro_bsz
        base = replace(shape, micro_bsz=usual, recompute=False)
        if shape != base:
            return self._moved(base, shape)
        if shape.shards > FOUR:
            found = self._fit(shape)
            if found is not None:
                return found
        return self._trace(shape)

    def _moved(self, base: ShardShape, shape: ShardShape) -> ShardParts:
        """Return the parts of a shape from those of one with other tokens or recomputing."""
        sharded = self.parts(base)
        timed = {}
        nbytes = {}
        for name in sharded.timed:
            before, old = self._like_whole(base, name)
            after, new = self._like_whole(shape, name)
            timed[name] = moved_part(
                sharded.timed[name],
                before.timed[old],
                after.timed[new],
            )
            nbytes[name] = moved_bytes(
                sharded.nbytes[name],
                before.nbytes[old],
                after.nbytes[new],
            )
        tokens = shape.micro_bsz / base.micro_bsz
        message = round(sharded.message * tokens)
        return replace(
            sharded,
            timed=timed,
            nbytes=nbytes,
            message=message,
        )

    def _like_whole(self, shape: ShardShape, name: str) -> tuple[ShardParts, str]:
        """Return the parts with whole weights of which one computes the same, and its name there."""
        plain = replace(shape, shards=1)
        depth = self._traced_depth(plain, shape.depth)
        direction, *kind, number = name.split(" ")
        if not kind:
            if shape.is_middle:
                depth = 1
            source = replace(
                plain,
                depth=depth,
                recompute=False,
            )
            return self.parts(source), name
        layer = int(number)
        like = self._like(plain, layer, shape.depth)
        source = replace(
            plain,
            depth=depth,
            is_middle=False,
        )
        parts = self.parts(source)
        return parts, f"{direction} layer {like}"

    def _trace(self, shape: ShardShape) -> ShardParts:
        traced = trace_parts(self._config, shape, traced_device(self._device))
        dtype = self._config.model.dtype.removeprefix("torch.")
        self.num_traces += 1
        return ShardParts(
            timed=time_parts(traced, self._device, dtype),
            nbytes=traced.nbytes,
            slots=traced.slots,
            message=traced.message,
            depth=shape.depth,
        )

    def _fit(self, shape: ShardShape) -> ShardParts | None:
        """Return the parts of a shape from those of two others; None where these are too different."""
        if shape.mode == "isp" and shape.tensor > TWO:
            # Where the tensor axis is larger than the weight axis, other ranks hold the
            # same weights.
            return None
        shards = shape.shards
        with_two = replace(shape, shards=TWO)
        with_four = replace(shape, shards=FOUR)
        two = self.parts(with_two)
        four = self.parts(with_four)
        slots = slots_at(two.slots, four.slots, shards)
        timed = parts_at(two.timed, four.timed, shards)
        if slots is None or timed is None:
            return None
        nbytes = bytes_at(two.nbytes, four.nbytes, shards)
        return replace(
            two,
            timed=timed,
            nbytes=nbytes,
            slots=slots,
        )


def _leading(shape: ShardShape) -> int:
    """Return how many layers at the beginning differ from those in the middle.

    FSDP2 keeps the first layer's gathered weights until the second one has its own.
    """
    return 2 if shape.shards > 1 else 1
