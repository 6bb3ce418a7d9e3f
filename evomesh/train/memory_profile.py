"""``--memory-profile``: peaks of memory by kind for each step, and what was alive when memory ran out.

Every operator is watched while it runs. A storage that it returns is counted under the
module in whose forward it was made, until the last tensor on it is gone. So the figures
are those of tensors, on each device alike: without workspaces inside an operator and
without what the allocator keeps. The latter is added on CUDA, where torch also writes its
own snapshot for https://pytorch.org/memory_viz.

    weights, masters, moments, gradients    held by model and optimizer
    activations                             made in a forward; the module has them
    backward                                made in a backward, until it is over
    other                                   batches, buckets, copies for a save
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.monitor.optional_output import OptionalOutput
from evomesh.optim.zero import ZeroOptimizer
from evomesh.outside_errors import is_out_of_memory
from evomesh.parallel.spec import local_shard
from evomesh.quantities import readable
from evomesh.train.stages import ModelStages
from evomesh.train.storage_watch import StorageWatch, storage_of

logger = logging.getLogger(__name__)

LARGEST = 10  # allocations in a snapshot
HISTORY_ENTRIES = 100_000  # of torch's own record of allocations on CUDA

WEIGHTS, MASTERS, MOMENTS = "weights", "masters", "moments"
GRADIENTS, ACTIVATIONS, BACKWARD, OTHER = (
    "gradients",
    "activations",
    "backward",
    "other",
)


@dataclass(frozen=True)
class Allocation:
    """A storage that is alive.

    Attributes:
        name: of the parameter or state, or of the module and the operator that made it.
        shape, dtype: of the first tensor on it.
    """

    nbytes: int
    kind: str
    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""


class MemoryTracker(StorageWatch):
    """Counts the storages of operators' results by kind, and keeps the kinds of the highest moment.

    Args:
        modules: id -> name of the modules that allocations are named by.
    """

    at_failure: list[Allocation] | None

    def __init__(self, modules: Mapping[int, str]) -> None:
        super().__init__()
        self._modules = modules
        self._entered = list[str]()
        # By address of the storage.
        self._alive = dict[int, Allocation]()
        self._bytes = Counter[str]()
        self._total = 0
        self.peak = 0
        self.peak_kinds = Counter[str]()
        self.at_failure = None

    def hold(self, tensor: Tensor, kind: str, name: str) -> None:
        """Count a tensor that exists already, or call it by a better name."""
        self._count(tensor, kind, name)

    def restart_peak(self) -> None:
        """Look for the next peak from what is alive now."""
        self.peak = 0
        self._note_peak()

    def largest(self, count: int = LARGEST) -> list[Allocation]:
        """Return the largest allocations that are alive."""
        ordered = sorted(self._alive.values(), key=lambda one: one.nbytes, reverse=True)
        return ordered[:count]

    def made(self, tensor: Tensor, operator: Any) -> None:
        kind, module = self._place()
        self._count(tensor, kind, f"{module}: {operator}")

    def resized(self, storage: torch.UntypedStorage) -> None:
        known = self._alive.get(storage._cdata)
        if known is not None:
            resized = replace(known, nbytes=storage.nbytes())
            self._put(storage._cdata, resized)

    def freed(self, key: int) -> None:
        self._remove(key)

    def failed(self, error: Exception) -> None:
        # The last one counts: a probe that found no memory has ended no run.
        if is_out_of_memory(error):
            self.at_failure = self.largest()

    def _place(self) -> tuple[str, str]:
        """Return the kind of what is made now, and the module that makes it."""
        if self._entered:
            return ACTIVATIONS, self._entered[-1]
        if torch._C._current_graph_task_id() != -1:
            return BACKWARD, "backward"
        return OTHER, "outside the model"

    def entered(self, module: nn.Module) -> None:
        above = self._entered[-1] if self._entered else type(module).__name__
        self._entered.append(self._modules.get(id(module), above))

    def left(self, module: nn.Module) -> None:
        if self._entered:
            self._entered.pop()

    def _count(self, tensor: Tensor, kind: str, name: str) -> None:
        storage = storage_of(tensor)
        if storage is None:
            return
        key = self.watch(storage)
        allocation = Allocation(
            nbytes=storage.nbytes(),
            kind=kind,
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype),
        )
        self._put(key, allocation)

    def _put(self, key: int, allocation: Allocation) -> None:
        self._remove(key)
        self._alive[key] = allocation
        self._bytes[allocation.kind] += allocation.nbytes
        self._total += allocation.nbytes
        self._note_peak()

    def _remove(self, key: int) -> None:
        allocation = self._alive.pop(key, None)
        if allocation is not None:
            self._bytes[allocation.kind] -= allocation.nbytes
            self._total -= allocation.nbytes

    def _note_peak(self) -> None:
        if self._total > self.peak:
            self.peak = self._total
            # Without the kinds of which nothing is alive.
            self.peak_kinds = +self._bytes


class MemoryProfile:
    """Context manager around the steps of a run.

    Args:
        folder: of the run; files go to its ``memory``.
        name: of this rank.
        stages: whose modules allocations are named by.
        optimizer: has masters, moments and the sums of gradients.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        stages: ModelStages,
        optimizer: ZeroOptimizer,
        device: torch.device,
    ) -> None:
        self._path = folder / "memory" / f"{name}.jsonl"
        self._device = device
        self._output = OptionalOutput("the memory profile", tries_again=True)
        self._stack = ExitStack()
        modules = {}
        for model in stages.models:
            for path, module in model.named_modules():
                modules[id(module)] = path or type(model).__name__
        self.tracker = MemoryTracker(modules)
        self._parameters = stages.parameters()
        self._hold_lasting(optimizer)

    def __enter__(self) -> MemoryProfile:
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                self._name_gradients(name, parameter)
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
            self._stack.callback(_stop_history)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._stack.enter_context(self.tracker.watching())
        self.tracker.restart_peak()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and is_out_of_memory(error):
            self._output.attempt(self._write_snapshot)
        self._stack.close()

    def _hold_lasting(self, optimizer: ZeroOptimizer) -> None:
        """Count what is alive during the whole run."""
        hold = self.tracker.hold
        for slot in optimizer.slots:
            sum_of_gradients = slot.accumulated_grad
            if sum_of_gradients is not None:
                name = f"{slot.name} (sum of gradients)"
                hold(sum_of_gradients, GRADIENTS, name)
        for name, tensor in optimizer.state_tensors().items():
            is_master = name.startswith("optim.master.")
            kind = MASTERS if is_master else MOMENTS
            hold(tensor, kind, name)
        # Last: the master of a float32 parameter is the parameter.
        for name, parameter in self._parameters.items():
            own_part = local_shard(parameter)
            hold(own_part, WEIGHTS, name)

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _name_gradients(self, name: str, parameter: Tensor) -> None:
        def rename(grown: Tensor) -> None:
            if grown.grad is not None:
                self.tracker.hold(grown.grad, GRADIENTS, f"{name}.grad")

        hook = parameter.register_post_accumulate_grad_hook(rename)  # type: ignore[no-untyped-call]
        self._stack.callback(hook.remove)

    def after_step(self, step: int) -> None:
        """Write the peak of a step, and look for that of the next one."""
        tracker = self.tracker
        row: dict[str, Any] = {
            "step": step,
            "peak": tracker.peak,
            "kinds": tracker.peak_kinds,
        }
        if self._on_cuda:
            device = self._device
            row["cuda_allocated"] = torch.cuda.max_memory_allocated(device)
            row["cuda_reserved"] = torch.cuda.max_memory_reserved(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._output.attempt(lambda: self._append(row))
        self.tracker.restart_peak()

    def _append(self, row: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")

    def _write_snapshot(self) -> None:
        """Write and log the largest allocations at the moment when memory ran out."""
        allocations = self.tracker.at_failure
        if allocations is None:  # not in an operator: what is alive still
            allocations = self.tracker.largest()
        table = allocation_table(allocations)
        path = self._path.with_suffix(".out-of-memory.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{table}\n", encoding="utf-8")
        logger.error("out of memory; the largest tensors (%s):\n%s", path, table)
        if self._on_cuda:
            pickled = path.with_suffix(".pickle")
            torch.cuda.memory._dump_snapshot(str(pickled))  # type: ignore[no-untyped-call]


def _stop_history() -> None:
    torch.cuda.memory._record_memory_history(enabled=None)


def allocation_table(allocations: Sequence[Allocation]) -> str:
    """Return a row for each allocation: size, kind, shape, dtype, name."""
    rows = []
    for one in allocations:
        shape = "x".join(map(str, one.shape)) or "scalar"
        dtype = one.dtype.removeprefix("torch.")
        rows.append(
            f"{readable(one.nbytes):>10}  {one.kind:<12} {shape:<20} {dtype:<9} {one.name}"
        )
    return "\n".join(rows)
