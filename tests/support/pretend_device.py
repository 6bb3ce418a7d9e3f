"""Counts what a GPU would copy to the host, with real values, where all tensors are on the CPU.

Every tensor counts as one of the device but what ``cpu`` returned and what was computed
from that alone. Whatever else needs a
value on the host raises: ``item``, ``tolist``, a tensor as a condition, as an index or as a
number of Python, and operations whose result has a shape that depends on values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__array__,
}
BY_VALUE = (
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten._local_scalar_dense.default,
)


class HostRead(AssertionError):
    """An operation for which the host would wait."""


class _PretendDevice(TorchFunctionMode):
    """Attributes:
    copies: shapes of the tensors that were copied to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[int, ...]] = []
        self._on_host: list[Tensor] = []

    def is_on_host(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage().data_ptr()
        return any(
            copy.untyped_storage().data_ptr() == storage for copy in self._on_host
        )

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        if function in READS and not self.is_on_host(args[0]):
            raise HostRead(f"{function.__name__} of {tuple(args[0].shape)}")
        if function is Tensor.cpu and not self.is_on_host(args[0]):
            self.copies.append(tuple(args[0].shape))
            copy = args[0].clone()
            self._on_host.append(copy)
            return copy
        result = function(*args, **(kwargs or {}))
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        ]
        if tensors and all(self.is_on_host(tensor) for tensor in tensors):
            self._on_host += [
                leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
            ]
        return result


class _ShapesByValue(TorchDispatchMode):
    def __init__(self, device: _PretendDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation in BY_VALUE and not self._device.is_on_host(args[0]):
            raise HostRead(str(operation))
        return operation(*args, **(kwargs or {}))


@contextmanager
def pretend_device() -> Iterator[_PretendDevice]:
    """Yield the list of copies to the host as ``copies``; raise at every other read of a value."""
    with _PretendDevice() as device, _ShapesByValue(device):
        yield device
