"""Weight sharding over ``wp`` (isp): FSDP2 gathers a block's weights before use and reduce-scatters their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from evomesh.errors import UserError
from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import ShardSpec, spec_of, with_spec


def shard_weights(
    model: nn.Module, blocks: Sequence[nn.Module], axis: Axis, device: torch.device, overlap: bool
) -> None:
    """Cuts every parameter of ``blocks`` along dim 0 over ``axis``, in place; the rest of ``model`` stays as it is.

    Gradients are summed over the axis (invariant 4), in float32 at least, after every micro-batch.

    Args:
        blocks: the modules that are gathered as one, in the order of forward. Parameters on the meta device are made on
            ``device`` once they are cut, so that no rank ever holds the whole model.
        device: where the model computes.
        overlap: gather the next block's weights while one computes.
    Raises:
        UserError: dim 0 of a parameter does not divide (FSDP2 would give the last ranks nothing).
    """
    if axis.size == 1:
        return
    assert axis.group is not None
    mesh = DeviceMesh.from_group(axis.group, device.type)
    specs = {name: spec_of(parameter) for name, parameter in model.named_parameters()}
    inside = {parameter for block in blocks for parameter in block.parameters()}
    _check(specs, model, inside, axis)
    for block in blocks:
        for unit in _units(block):
            policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(_dtype(unit), torch.float32))
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    # The root holds no weights of its own: it shares streams and order among the blocks.
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p not in inside})
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor inside
    if overlap:
        for block, following in pairwise(blocks):
            cast(FSDPModule, block).set_modules_to_forward_prefetch([cast(FSDPModule, following)])
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        with_spec(parameter, specs[name])


def _check(specs: dict[str, ShardSpec], model: nn.Module, inside: set[nn.Parameter], axis: Axis) -> None:
    for name, parameter in model.named_parameters():
        if parameter in inside and parameter.shape[0] % axis.size:
            raise UserError(
                f"{name} has {parameter.shape[0]} rows, which weight.size={axis.size} does not divide",
                where="parallel.weight.size",
                expected=f"a divisor of {parameter.shape[0]}",
            )


def _units(block: nn.Module) -> Iterable[nn.Module]:
    """Modules with another dtype than most of the block (norms kept in float32), then the block: one dtype a unit."""
    dtype = _dtype(block)
    for module in block.modules():
        own = list(module.parameters(recurse=False))
        if own and module is not block and own[0].dtype != dtype:
            yield module
    yield block


def _dtype(module: nn.Module) -> torch.dtype:
    """The dtype of most of the module's elements."""
    elements: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        elements[parameter.dtype] = elements.get(parameter.dtype, 0) + parameter.numel()
    return max(elements, key=lambda dtype: elements[dtype])
