"""Recording of communication: every c10d call under ``record_traffic``, including FSDP2's and the pipeline's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from evomesh.parallel.grid import Grid

# c10d operator -> (name here, position of the argument that holds the whole, unsharded value)
_OPERATORS = {
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
    "recv_": ("recv", 0),
}


@dataclass(frozen=True)
class CollectiveCall:
    """One collective: operation, axis, and the bytes of one copy of the whole value that it moves over the axis."""

    operation: str
    axis: str
    nbytes: int


@dataclass
class TrafficLog:
    """Recorded collectives, in the order of launch."""

    calls: list[CollectiveCall] = field(default_factory=list)

    def count(self) -> dict[tuple[str, str], int]:
        """Return the number of calls by (operation, axis)."""
        return dict(Counter((call.operation, call.axis) for call in self.calls))

    def nbytes(self) -> dict[tuple[str, str], int]:
        """Return the sum of bytes by (operation, axis)."""
        total: Counter[tuple[str, str]] = Counter()
        for call in self.calls:
            total[call.operation, call.axis] += call.nbytes
        return dict(total)


@contextmanager
def record_traffic(grid: Grid) -> Iterator[TrafficLog]:
    """Record every collective launched in the ``with`` block.

    Args:
        grid: gives the groups their names; a group that belongs to no axis is "world". Axes with the same ranks share a
            group, which gets the first matching name of tp, wp, pp, dp, zero, replica.
    """
    names = group_names(grid)
    traffic = TrafficLog()
    with _TrafficRecorder(traffic, names):
        yield traffic


class _TrafficRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, traffic: TrafficLog, names: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._traffic, self._names = traffic, names

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            call = describe_call(func, args, self._names)
            if call is not None:
                self._traffic.calls.append(call)
        return func(*args, **(kwargs or {}))


def describe_call(
    func: Any, args: tuple[Any, ...], names: Mapping[str, str]
) -> CollectiveCall | None:
    """Return what a c10d operator moves; None for one that moves nothing, such as a barrier.

    Args:
        names: axis by name of its group, from ``group_names``.
    """
    operator = func._schema.name.removeprefix("c10d::")
    if operator not in _OPERATORS:
        return None
    operation, position = _OPERATORS[operator]
    nbytes = _bytes_of(args[position])
    return CollectiveCall(operation, _axis_name(args, names), nbytes)


def _axis_name(args: tuple[Any, ...], names: Mapping[str, str]) -> str:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                group = ProcessGroup.unbox(argument)
            except RuntimeError:  # a ReduceOp is a script object too
                continue
            return names.get(group.group_name, "world")
    return "world"


def group_names(grid: Grid) -> dict[str, str]:
    """Return axes by the names of their groups; of two axes with the same ranks the first."""
    axes = (grid.tp, grid.wp, grid.pp, grid.dp, grid.zero, grid.replica)
    names: dict[str, str] = {}
    for axis in axes:
        if axis.group is not None:
            names.setdefault(axis.group.group_name, axis.name)
    return names


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return (
        sum(_bytes_of(item) for item in value) if isinstance(value, list | tuple) else 0
    )
