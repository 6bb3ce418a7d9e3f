"""Units of modules that gather their sharded weights together, and where in forward the next gather starts.

With ``parallel.weight.forward_overlap_per="layer"`` a unit is a block, and the gather of
the next block starts in the middle of this one, at ``launch_allgather_before``:

    block i      wqkv   attention   wo   feed-forward
                 ^wqkv  ^attn       ^wo  ^w1            the gather of block i + 1 starts

Early hides more of a slow gather, late holds two blocks' weights for a shorter time.
With "module" attention and feed-forward network are units of their block, and each one
starts the gather of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import cast

from torch import nn

from evomesh.config.schema import WeightConfig
from evomesh.errors import UserError
from evomesh.models.decoder import Decoder, DecoderBlock
from evomesh.parallel.grid import Axis
from evomesh.parallel.weights import GatherPoint


def sharding_units(
    model: nn.Module, axis: Axis, weight: WeightConfig
) -> list[nn.Module]:
    """Return the modules whose weights are gathered together, a module before the one that contains it.

    They are the blocks and, under fsdp, embedding and head. For a custom model only the
    blocks, because other weights might be read outside their module's forward. A tied
    embedding is used by two modules, at the beginning and at the end of forward: it
    stays whole.

    Raises:
        UserError: a custom model has no layers.
    """
    units: list[nn.Module] = []
    for layer in _layers_in_order(model, axis):
        if _splits(layer, model, weight):
            block = cast(DecoderBlock, layer)
            units += [block.attention, block.feed_forward]
        units.append(layer)
    return units


def gather_points(
    model: nn.Module,
    axis: Axis,
    weight: WeightConfig,
) -> list[GatherPoint]:
    """Return where in forward the gather of each layer after the first one, or of each module, starts."""
    points: list[GatherPoint] = []
    layers = _layers_in_order(model, axis)
    # Each layer starts the gather of the next one; the last layer has none after it.
    for layer, following in zip_longest(layers, layers[1:]):
        next_units = _first_units(following, model, weight)
        if _splits(layer, model, weight):
            # Two units: attention starts the gather of the network after it.
            block = cast(DecoderBlock, layer)
            in_block = GatherPoint(block.attention, (block.feed_forward,))
            points.append(in_block)
            at_end = GatherPoint(block.feed_forward, next_units)
            points.append(at_end)
        else:
            module, is_after = _point_in_layer(layer, model, weight)
            point = GatherPoint(module, next_units, is_after)
            points.append(point)
    return [point for point in points if point.units]


def units_read_in_forward_only(
    model: nn.Module, units: Sequence[nn.Module]
) -> list[nn.Module]:
    """Return the units whose weights no backward reads: gathering them for it would be traffic for nothing.

    The gradient of an embedding needs the ids alone, and the loss makes that of the head
    in forward (``layers/loss.py``). A normalized head is another matter: the gradient of
    the normalization reads the weight.
    """
    if not isinstance(model, Decoder):
        return []
    # A stage of a pipeline may have neither.
    ends: list[nn.Module | None] = [model.embedding]
    if not model.config.norm_head:
        ends.append(model.head)
    found: list[nn.Module] = []
    for end in ends:
        if end is not None and end in units:
            found.append(end)
    return found


def _first_units(
    layer: nn.Module | None, model: nn.Module, weight: WeightConfig
) -> tuple[nn.Module, ...]:
    """Return the units that a layer needs first: itself, with the norms, and its attention where that is separate."""
    if layer is None:
        return ()
    if _splits(layer, model, weight):
        return layer, cast(DecoderBlock, layer).attention
    return (layer,)


def _layers_in_order(model: nn.Module, axis: Axis) -> list[nn.Module]:
    """Return the modules that hold the sharded weights, in the order of forward."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleDict | nn.ModuleList) or not len(layers):
        raise UserError(
            f"{type(model).__name__} has no layers whose weights can be sharded",
            where="parallel.weight.size"
            if axis.name == "wp"
            else "parallel.zero1.fsdp",
            expected="a model with its blocks in self.layers, an nn.ModuleDict or nn.ModuleList",
            code="EVO-PARALLEL-008",
        )
    blocks = list(layers.values() if isinstance(layers, nn.ModuleDict) else layers)
    if axis.name == "wp" or not isinstance(model, Decoder):
        return blocks
    if model.config.tie_word_embeddings:
        return blocks
    ends_and_blocks = (model.embedding, *blocks, model.head)
    return [module for module in ends_and_blocks if module is not None]


def _splits(layer: nn.Module, model: nn.Module, weight: WeightConfig) -> bool:
    """Return whether attention and feed-forward network of a layer gather their weights apart.

    A compiled block is one graph, without hooks inside: it stays whole.
    """
    per_module = weight.overlap and weight.forward_overlap_per == "module"
    return per_module and isinstance(layer, DecoderBlock) and not _is_compiled(model)


def _point_in_layer(
    layer: nn.Module, model: nn.Module, weight: WeightConfig
) -> tuple[nn.Module, bool]:
    """Return the module in a layer at which the next gather starts, and whether that is after its forward."""
    if not isinstance(layer, DecoderBlock) or _is_compiled(model):
        return layer, False
    attention = layer.attention
    modules: dict[str, nn.Module] = {
        "wqkv": attention.wqkv,
        "attn": attention.wqkv,
        "wo": attention.wo,
        "w1": layer.feed_forward,
    }
    point = weight.launch_allgather_before
    # The product of queries with keys is not a module: it starts where wqkv has ended.
    is_after = point == "attn"
    return modules[point], is_after


def _is_compiled(model: nn.Module) -> bool:
    return isinstance(model, Decoder) and model.compiled
