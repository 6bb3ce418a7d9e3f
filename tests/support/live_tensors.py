"""``LiveTensors``: the bytes of a process's tensors, followed operator by operator; it shares no code with the planner.

tracker = LiveTensors()
with tracker:                       # before anything is built
    model = ...
    tracker.label(model.weight, "weights")
    tracker.restart()
    train_step(...)
assert tracker.peak == sum(tracker.at_peak.values())
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = "activations and buffers"


class LiveTensors(TorchDispatchMode):
    """Counts each storage once, from the first operator that touches it until its last tensor is gone.

    Attributes:
        peak, at_peak: the most bytes after any operator, and what they were.
        with_gradients: parameters whose ``grad`` counts as gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self._references: dict[int, weakref.ref[Any]] = {}  # by id of the storage
        self._sizes: dict[int, int] = {}
        self._labels: dict[int, str] = {}
        self._resizable: dict[int, weakref.ref[Any]] = {}  # what FSDP2 gathers into
        self._bytes: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.with_gradients: Sequence[Tensor] = ()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        touched = [*_tensors(args), *_tensors((kwargs or {}).values()), *_tensors(out)]
        for tensor in touched:
            storage = tensor.untyped_storage()
            self._follow(storage)
            if func.namespace == "fsdp":
                self._resizable[id(storage)] = weakref.ref(storage)
        for reference in list(self._resizable.values()):
            storage = reference()
            if storage is not None:
                self._follow(storage)
        self._label_gradients()
        self._note_peak()
        return out

    def label(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor is for."""
        storage = _local(tensor).untyped_storage()
        self._follow(storage)
        key = id(storage)
        if self._labels.get(key, OTHER) != kind:
            self._bytes[self._labels.get(key, OTHER)] -= self._sizes[key]
            self._bytes[kind] += self._sizes[key]
            self._labels[key] = kind

    def restart(self) -> None:
        """Look for the peak from here on."""
        self.peak = 0
        self._note_peak()

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._references:
            self._references[key] = weakref.ref(storage, self._ending(key))
            self._sizes[key] = 0
        growth = storage.nbytes() - self._sizes[key]
        self._sizes[key] += growth
        self._bytes[self._labels.get(key, OTHER)] += growth

    def _ending(self, key: int) -> Callable[[Any], None]:
        def end(_: Any) -> None:
            del self._references[key]
            self._resizable.pop(key, None)
            kind = self._labels.pop(key, OTHER)
            self._bytes[kind] -= self._sizes.pop(key)

        return end

    def _label_gradients(self) -> None:
        for parameter in self.with_gradients:
            if parameter.grad is not None:
                self.label(parameter.grad, "gradients")

    def _note_peak(self) -> None:
        total = self._bytes.total()
        if total > self.peak:
            self.peak = total
            self.at_peak = {kind: size for kind, size in self._bytes.items() if size}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(values: Iterable[Any] | Any) -> list[Tensor]:
    """The tensors with memory in nested lists and tuples."""
    if isinstance(values, Tensor):
        is_wrapper = type(values) not in (Tensor, torch.nn.Parameter)
        return [] if is_wrapper or values.device.type == "meta" else [values]
    if isinstance(values, str) or not isinstance(values, Iterable):
        return []
    found = []
    for value in values:
        found += _tensors(value)
    return found
