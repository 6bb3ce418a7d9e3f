"""Weight sharding, over ``wp`` (isp) or ``zero`` (fsdp): FSDP2 gathers a block's weights before use and reduce-scatters
their gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from evomesh.errors import UserError
from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import ShardSpec, spec_of, with_spec


def shard_weights(
    model: nn.Module, units: Sequence[nn.Module], axis: Axis, device: torch.device, *, overlap: bool = False
) -> None:
    """Cuts every parameter of ``units`` along dim 0 over ``axis``, in place; the rest of ``model`` stays as it is.

    Gradients are summed over the axis (invariant 4), in float32 at least, after every micro-batch. A parameter whose
    layer has it on another axis already is cut on that one first, and again here.

    Args:
        units: the modules that are gathered as one, in the order of forward. Parameters on the meta device are made on
            ``device`` once they are cut, so that no rank ever holds the whole model.
        axis: ``wp`` (isp), or ``zero`` (``parallel.zero1.fsdp``), over which what does not divide stays whole.
        device: where the model computes.
        overlap: gather the next unit's weights while one computes.
    Raises:
        UserError: dim 0 of a parameter does not divide by ``wp``, which was asked for by its size.
    """
    if axis.size == 1:
        return
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
    )  # slow to import, seldom used

    assert axis.group is not None
    # Nothing here works in place on what a module returns, which FSDP2 fears for views.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = DeviceMesh.from_group(axis.group, device.type)
    cut = {
        parameter for unit in units for parameter in unit.parameters() if parameter.shape[0] % axis.size == 0
    }
    if axis.name == "wp":
        _check(model, {parameter for unit in units for parameter in unit.parameters()} - cut, axis)
    specs = {name: _cut_spec(p, axis) if p in cut else spec_of(p) for name, p in model.named_parameters()}
    whole = {parameter for parameter in model.parameters() if parameter not in cut}
    for module in units:
        for unit in _same_dtype(module):
            policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(_dtype(unit), torch.float32))
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)
    # The root cuts no weights of its own: it shares streams and order among the units.
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p not in cut})
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor inside
    if overlap:
        for unit, following in pairwise(units):
            cast(FSDPModule, unit).set_modules_to_forward_prefetch([cast(FSDPModule, following)])
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        with_spec(parameter, specs[name])


def _cut_spec(parameter: nn.Parameter, axis: Axis) -> ShardSpec:
    """The spec once ``axis`` cuts dim 0: layers of isp say so themselves."""
    spec = spec_of(parameter)
    return spec if (axis.name, 0) in spec.shards else replace(spec, shards=(*spec.shards, (axis.name, 0)))


def _check(model: nn.Module, uneven: set[nn.Parameter], axis: Axis) -> None:
    for name, parameter in model.named_parameters():
        if parameter in uneven:  # FSDP2 would give the last ranks nothing
            raise UserError(
                f"{name} has {parameter.shape[0]} rows, which weight.size={axis.size} does not divide",
                where="parallel.weight.size",
                expected=f"a divisor of {parameter.shape[0]}",
            )


def _same_dtype(block: nn.Module) -> Iterable[nn.Module]:
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
