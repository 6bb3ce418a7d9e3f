"""``StorageWatch``: notice every storage that operators make, that FSDP2 resizes, and that goes away.

Memory is counted in storages, not in tensors: a view costs nothing, and a storage lives
until the last tensor on it is gone. A dispatch mode sees the results of every operator,
of backward's too; a finalizer tells when a storage goes. What FSDP2 gathers comes neither
way: it keeps an empty storage and resizes it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageWatch(TorchDispatchMode):
    """Calls ``made``, ``resized`` and ``freed`` for the storages of a ``with`` block; a subclass counts them."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched: set[int] = set()  # addresses of storages

    def made(self, tensor: Tensor, operator: Any) -> None:
        """Take note of a result whose storage is that of no argument."""
        raise NotImplementedError

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Take note of a storage that has another size now."""
        raise NotImplementedError

    def freed(self, key: int) -> None:
        """Take note of the end of a storage that ``watch`` returned the key of."""
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """Take note of an operator that raised; nothing by default."""

    def entered(self, module: nn.Module) -> None:
        """Take note of a forward that begins; nothing by default."""

    def left(self, module: nn.Module) -> None:
        """Take note of a forward that is over; nothing by default."""

    def watch(self, storage: torch.UntypedStorage) -> int:
        """Return the key of a storage, for which ``freed`` will be called once."""
        key: int = storage._cdata
        if key not in self._watched:
            self._watched.add(key)
            weakref.finalize(storage, self._end, key)
        return key

    def _end(self, key: int) -> None:
        # The address may belong to another storage next.
        self._watched.discard(key)
        self.freed(key)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of what happens in the ``with`` block."""
        resize = torch.UntypedStorage.resize_

        def watched_resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self.resized(storage)
            return result

        watching_modules = _hooked(self.entered, self.left)
        watching_resizes = patch.object(torch.UntypedStorage, "resize_", watched_resize)
        with watching_modules, watching_resizes, self:
            yield

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            self.failed(error)
            raise
        # Views and tensors written in place share the storage of an argument.
        existing = set()
        for _, storage in _tensors_with_storages((args, kwargs)):
            existing.add(storage._cdata)
        for tensor, storage in _tensors_with_storages(result):
            if storage._cdata not in existing:
                self.made(tensor, func)
        return result


@contextmanager
def _hooked(
    entered: Callable[[nn.Module], None], left: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Call ``entered`` before each forward of any module, and ``left`` after it, also where it raised."""
    enter = register_module_forward_pre_hook(lambda module, inputs: entered(module))
    leave = register_module_forward_hook(
        lambda module, inputs, output: left(module), always_call=True
    )
    try:
        yield
    finally:
        leave.remove()
        enter.remove()


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the storage of a tensor; None of one without memory, such as a wrapper."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


def _tensors_with_storages(nest: Any) -> Iterator[tuple[Tensor, torch.UntypedStorage]]:
    """Yield the tensors that have memory in a nest of arguments or results."""
    for leaf in tree_leaves(nest):
        if isinstance(leaf, Tensor):
            storage = storage_of(leaf)
            if storage is not None:
                yield leaf, storage
