"""Tensors of a device without values, next to real ones of the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class DeviceError(AssertionError):
    """An operation that a GPU would refuse, or for which the host would wait."""


class FakeDevice(TorchDispatchMode):
    """Runs what touches the device on tensors without values, and the rest really, on the host.

    A tensor of the device and one of the host meet in copies only; a host tensor
    without dimensions counts as a number, as on CUDA.

    Attributes:
        reads: shapes of the tensors that were copied to the host, which are then ones.
        batch_copies: the number of copies to the device for which nobody waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.reads: list[tuple[int, ...]] = []
        self.batch_copies = 0

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, dict(kwargs)))
        on_device = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        device = kwargs.get("device")
        makes_device_tensor = device is not None and torch.device(device).type == "cuda"
        if not on_device and not makes_device_tensor:
            return operation(*args, **kwargs)
        host = [
            leaf
            for leaf in leaves
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
        ]
        if operation in COPIES:
            if on_device and device is not None and not makes_device_tensor:
                return self._read(on_device[0], kwargs)
            self._check_copy(operation, args, kwargs, host)
        elif on_device and any(tensor.dim() > 0 for tensor in host):
            shapes = [tuple(tensor.shape) for tensor in host]
            raise DeviceError(f"{operation} of the device meets host tensors {shapes}")
        with self._fake:
            return operation(*args, **kwargs)

    def _read(self, source: Tensor, options: Mapping[str, Any]) -> Tensor:
        self.reads.append(tuple(source.shape))
        return torch.ones(source.shape, dtype=options.get("dtype") or source.dtype)

    def _check_copy(
        self,
        operation: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        host: list[Tensor],
    ) -> None:
        if not host:
            return
        if operation is COPIES[1] and not isinstance(args[0], FakeTensor):
            raise DeviceError(f"copy of {tuple(args[0].shape)} to the host")
        is_asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
        if not is_asynchronous:
            shape = tuple(host[0].shape)
            raise DeviceError(f"the host waits for a copy of {shape} to the device")
        self.batch_copies += 1
