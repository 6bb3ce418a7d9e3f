"""Finds whatever makes the host wait for a device, where there is no device.

On the meta device a tensor has no values, so that every operation that needs one on the host raises: ``item``,
``tolist``, ``nonzero``, indexing with a mask, a copy to the host. What raises nothing there, although CUDA waits, is
looked for here: a blocking copy from the host, and a tensor made of Python numbers, which is such a copy.
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

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray)


class HostWaits(AssertionError):
    """An operation for which the host would wait."""


class _Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.begun = 0  # copies to the device that nobody waits for

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if operation in COPIES:
            source = args[-1] if operation is COPIES[0] else args[1]
            if source.is_cpu and not result.is_cpu:
                if not (
                    kwargs.get("non_blocking")
                    or (operation is COPIES[1] and args[2:] == (True,))
                ):
                    raise HostWaits(
                        f"blocking copy of {tuple(source.shape)} to the device"
                    )
                self.begun += 1
        return result


class _Numbers(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if (
            function in FROM_NUMBERS
            and not result.is_cpu
            and not isinstance(args[0], Tensor)
        ):
            raise HostWaits(f"{args[0]!r} is copied to the device")
        return result


@contextmanager
def no_host_waits() -> Iterator[_Copies]:
    """Raises where the host would wait for the meta device; yields the count of copies that it does not wait for."""
    with _Numbers(), _Copies() as copies:
        yield copies


class _Messages(TorchDispatchMode):
    def __init__(self, messages: list[Tensor]) -> None:
        super().__init__()
        self._messages = messages

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation.namespace == "c10d":
            leaves = tree_leaves(args)
            self._messages += [leaf for leaf in leaves if isinstance(leaf, Tensor)][:1]
        return operation(*args, **(kwargs or {}))


@contextmanager
def record_messages() -> Iterator[list[Tensor]]:
    """Yields the first tensor of every collective, which says on which device it runs."""
    messages: list[Tensor] = []
    with _Messages(messages):
        yield messages
