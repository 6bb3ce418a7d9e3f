"""Values that the host reads of tensors without values, in a trace of a step on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode

from evomesh.parallel import weights
from evomesh.parallel.spec import is_sharded

_aten = torch.ops.aten


@contextmanager
def tensors_without_values() -> Iterator[None]:
    """Let the CPU's tensors have no memory in the ``with`` block; what the host reads of them is what is usual."""
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    make_mesh = weights.weight_mesh
    to_empty = nn.Module.to_empty

    def with_ranks(*args: Any) -> Any:
        # A mesh looks itself up in a tensor of ranks.
        with unset_fake_temporarily():
            return make_mesh(*args)

    def to_empty_too(
        module: nn.Module, *, device: torch.device, recurse: bool = True
    ) -> nn.Module:
        with _set_aside(module, device):
            return to_empty(module, device=device, recurse=recurse)

    with (
        patch.object(nn.Module, "to_empty", to_empty_too),
        patch.object(weights, "weight_mesh", with_ranks),
        FakeTensorMode(),
        UsualValues(),
    ):
        yield


@contextmanager
def _set_aside(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Move the parameters without values to a device, and hide them from torch, which cannot, in the ``with`` block."""
    moved = []
    for owner in module.modules():
        named = list(_whole_parameters(owner))
        for name, parameter in named:
            empty = torch.empty_like(parameter, device=device)
            needs_gradient = parameter.requires_grad
            fresh = nn.Parameter(empty, needs_gradient)
            owner._parameters[name] = None
            place = (owner, name, fresh)
            moved.append(place)
    yield
    for owner, name, fresh in moved:
        owner._parameters[name] = fresh


def _whole_parameters(owner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's own parameters without values that are not sharded."""
    for name, parameter in owner.named_parameters(recurse=False):
        if is_fake(parameter) and not is_sharded(parameter):
            yield name, parameter


class UsualValues(TorchDispatchMode):
    """Answers for tensors without values: a number is 1, and every element of a condition is true."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        has_values = not any(is_fake(value) for value in args)
        if has_values:
            return func(*args, **(kwargs or {}))
        if func is _aten._local_scalar_dense.default:
            return 1
        if func is _aten.nonzero.default:
            (condition,) = args
            shape = (condition.numel(), condition.dim())
            return condition.new_empty(shape, dtype=torch.long)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class KnownBounds:
    """Stands for sequence bounds on the host, of micro-batches that are all alike."""

    bounds: tuple[int, ...]

    def __getitem__(self, index: int) -> KnownBounds:
        return self

    def tolist(self) -> list[int]:
        return list(self.bounds)
