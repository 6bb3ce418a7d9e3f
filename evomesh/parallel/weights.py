"""Weight sharding by FSDP2, over ``wp`` (isp) or ``zero`` (fsdp).

FSDP2 gathers a block's weights before use and reduce-scatters their gradients after the
block's backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from evomesh.errors import UserError
from evomesh.parallel.grid import Axis
from evomesh.parallel.recording import RecordedAllGather, RecordedReduceScatter
from evomesh.parallel.spec import ShardSpec, spec_of, with_spec

if TYPE_CHECKING:  # slow to import
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter


@dataclass(frozen=True)
class GatherPoint:
    """A place in forward at which the weights of later units begin to be gathered.

    Attributes:
        module: forward of this module is the place.
        units: the units whose gathers start there.
        is_after: they start after the module's forward instead of before it.
    """

    module: nn.Module
    units: tuple[nn.Module, ...]
    is_after: bool = False


def shard_weights(
    model: nn.Module,
    units: Sequence[nn.Module],
    axis: Axis,
    device: torch.device,
    *,
    prefetch: Sequence[GatherPoint] = (),
    read_in_forward_only: Sequence[nn.Module] = (),
) -> None:
    """Shard every parameter of ``units`` along dim 0 over ``axis``, in place; the rest of ``model`` is unchanged.

    Gradients are summed over the axis (invariant 4 in docs/architecture.md), in float32
    at least, after every micro-batch. A parameter that its layer has already sharded
    over another axis is sharded again here.

    Args:
        units: the modules whose weights are gathered together, a module before what contains it. Parameters on meta
            are allocated on ``device`` once they are sharded, so that no rank ever holds the unsharded model.
        axis: ``wp`` (isp), or ``zero`` (``parallel.zero1.fsdp``), over which indivisible parameters are replicated.
            Over both, those of another dtype than most of their unit are replicated, if their layers allow it.
        device: the device the model computes on.
        prefetch: where in forward the gathers of later units start; without, each unit gathers when it begins.
        read_in_forward_only: units whose backward does not read their weights: they are not gathered for it.

    Raises:
        UserError: dim 0 of a parameter is not divisible by the size of ``wp``.
    """
    if axis.size == 1:
        return
    # 1. Which parameters are sharded, and the spec of every parameter afterwards.
    in_units = {parameter for unit in units for parameter in unit.parameters()}
    sharded = {
        parameter for parameter in in_units if parameter.shape[0] % axis.size == 0
    }
    whole = _parameters_of_minor_dtype(units)
    if axis.name == "wp":
        whole = {parameter for parameter in whole if _stays_whole(parameter)}
        _refuse_indivisible(model, in_units - sharded - whole, axis)
    sharded -= whole
    specs = _specs_after_sharding(model, sharded, axis)
    shared = _shared_parameters(model)

    # 2. FSDP2 takes over the units.
    _apply_fsdp(model, units, sharded, axis, device)
    _time_gathers(prefetch, read_in_forward_only)

    # 3. Allocate what was on the meta device; FSDP2 has replaced the parameters, so each gets its spec again.
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
        _share_again(model, shared)
    for name, parameter in model.named_parameters():
        with_spec(parameter, specs[name])


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Map each further name of a parameter that several modules hold to its first name."""
    first_names: dict[nn.Parameter, str] = {}
    further: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in first_names:
            further[name] = first_names[parameter]
        else:
            first_names[parameter] = name
    return further


def _share_again(model: nn.Module, shared: dict[str, str]) -> None:
    """Undo what ``to_empty`` does to a shared parameter: it allocates one for each module."""
    for name, first in shared.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, model.get_parameter(first))


def _specs_after_sharding(
    model: nn.Module, sharded: set[nn.Parameter], axis: Axis
) -> dict[str, ShardSpec]:
    specs = {}
    for name, parameter in model.named_parameters():
        specs[name] = (
            _sharded_spec(parameter, axis)
            if parameter in sharded
            else spec_of(parameter)
        )
    return specs


def _apply_fsdp(
    model: nn.Module,
    units: Sequence[nn.Module],
    sharded: set[nn.Parameter],
    axis: Axis,
    device: torch.device,
) -> None:
    # Slow to import.
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # FSDP2 warns about in-place changes to views that modules return; there are none
    # here.
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view tensor"
    )
    mesh = weight_mesh(axis, device)
    replicated = {
        parameter for parameter in model.parameters() if parameter not in sharded
    }
    for unit in units:
        for module in _same_dtype(unit, sharded):
            if isinstance(module, FSDPModule):
                continue  # the unit inside this one has taken it
            reduce_dtype = torch.promote_types(_dtype(module), torch.float32)
            policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                ignored_params=replicated,
            )
        if hasattr(unit, "logits"):
            # Called during a run only between steps, and gathers as forward does.
            register_fsdp_forward_method(unit, "logits")
    # The root shards no further weights: it shares streams and order among the units.
    not_sharded = {
        parameter for parameter in model.parameters() if parameter not in sharded
    }
    fully_shard(model, mesh=mesh, ignored_params=not_sharded)
    gather = RecordedAllGather(axis)
    scatter = RecordedReduceScatter(axis)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no sum with a built-in factor.
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_all_gather(cast("AllGather", gather))
            module.set_custom_reduce_scatter(cast("ReduceScatter", scatter))


def weight_mesh(axis: Axis, device: torch.device) -> DeviceMesh:
    """Return the mesh over which weights are sharded."""
    assert axis.group is not None
    return DeviceMesh.from_group(axis.group, device.type)


def _time_gathers(
    prefetch: Sequence[GatherPoint], read_in_forward_only: Sequence[nn.Module]
) -> None:
    """Start gathers early at the points of ``prefetch``, and leave out those that backward does not need."""
    for point in prefetch:
        _start_gathers_at(point)
    for unit in read_in_forward_only:
        cast("FSDPModule", unit).set_unshard_in_backward(False)


def _start_gathers_at(point: GatherPoint) -> None:
    from torch.distributed.fsdp import FSDPModule

    units = [cast(FSDPModule, unit) for unit in point.units]
    if isinstance(point.module, FSDPModule) and not point.is_after:
        # FSDP2's own hook starts them, which works in compiled blocks too.
        point.module.set_modules_to_forward_prefetch(units)
        return

    def start(*_: object) -> None:
        # A recomputed forward runs in backward, where the later units have done
        # their work: gathering them again would be traffic for nothing.
        is_in_backward = torch._C._current_graph_task_id() != -1
        if not is_in_backward:
            for unit in units:
                unit.unshard(async_op=True)

    if point.is_after:
        point.module.register_forward_hook(start)
    else:
        point.module.register_forward_pre_hook(start)


def _sharded_spec(parameter: nn.Parameter, axis: Axis) -> ShardSpec:
    """Return the spec with dim 0 sharded over ``axis``; layers of isp state it in their specs already."""
    spec = spec_of(parameter)
    shard = (axis.name, 0)
    if shard in spec.shards:
        return spec
    return replace(spec, shards=(*spec.shards, shard))


def _refuse_indivisible(
    model: nn.Module, indivisible: set[nn.Parameter], axis: Axis
) -> None:
    for name, parameter in model.named_parameters():
        if parameter in indivisible:  # FSDP2 would give the last ranks nothing
            raise UserError(
                f"{name} has {parameter.shape[0]} rows, which weight.size={axis.size} does not divide",
                where="parallel.weight.size",
                expected=f"a divisor of {parameter.shape[0]}",
                code="EVO-PARALLEL-008",
            )


def _parameters_of_minor_dtype(units: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Return the parameters whose dtype is not that of most of their unit: norms kept in float32.

    FSDP2 needs one dtype per unit, so that each norm would be a separate unit: two
    gathers and a reduce-scatter of 16 KiB, which take as long as those of megabytes. They
    stay whole, and the optimizer sums their gradients.
    """
    minor: set[nn.Parameter] = set()
    for unit in units:
        dtype = _dtype(unit)
        minor |= {one for one in unit.parameters() if one.dtype != dtype}
    return minor


def _stays_whole(parameter: nn.Parameter) -> bool:
    """Return whether the layer that made a parameter says how the gradients of whole copies are summed under isp.

    Those of a custom module, without a spec, are sharded like all others.
    """
    has_spec = hasattr(parameter, "spec")
    return has_spec and ("wp", 0) not in spec_of(parameter).shards


def _same_dtype(block: nn.Module, sharded: set[nn.Parameter]) -> Iterable[nn.Module]:
    """Yield modules whose sharded weights differ in dtype from most of the block (custom ones), then the block.

    FSDP2 needs one dtype per unit.
    """
    dtype = _dtype(block)
    for module in block.modules():
        own = [one for one in module.parameters(recurse=False) if one in sharded]
        if own and module is not block and own[0].dtype != dtype:
            yield module
    yield block


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of most of the module's elements."""
    elements: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        elements[parameter.dtype] = elements.get(parameter.dtype, 0) + parameter.numel()
    return max(elements, key=lambda dtype: elements[dtype])
