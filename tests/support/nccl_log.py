"""What a rank asks of its process groups, written down in the order in which it asks.

The ranks of the pool talk through gloo, which forgives what NCCL does not. So each
rank logs every operation, and ``nccl_model.py`` plays the logs of all ranks back under
NCCL's rules. A log is a file of JSON lines, each written at once: it is complete up to
the last operation even where a rank hangs or dies in it.

    ["group", name, ranks]                             a communicator, before its first use
    ["stack", number, text]                            a place in the code, before its first use
    ["call", op, thread, name, what, stack]            a collective; "what" must be equal on all ranks
    ["send" or "receive", op, thread, name, peer, what, stack, batch]
    ["wait", thread, op]                               what follows needs the result of "op"
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Methods of a process group, in the names of torch 2.11 to 2.13.
COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "broadcast",
    "reduce",
    "allgather",
    "_allgather_base",
    "all_gather_single",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "all_gather_single_coalesced",
    "gather",
    "scatter",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single_coalesced",
    "alltoall",
    "alltoall_base",
    "all_to_all_single",
    "barrier",
)
# The argument that only the root of a collective has.
ROOT_HAS_LIST = {"gather": 0, "scatter": 1}
DIRECTIONS = {"send": "send", "recv": "receive"}
MIXED_BACKENDS = "cpu:gloo,cuda:nccl"  # what a job on GPUs starts its groups with
_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)


class HostTensor(Tensor):
    """A tensor that would be in host memory on a machine with GPUs, and so whatever is computed from it.

    No operation of a real GPU would take it, and NCCL neither.
    """


class HostTensorError(AssertionError):
    """A host tensor in a group whose ranks talk through NCCL only."""


class LoggedWork:
    """A pending operation whose ``wait`` is logged."""

    def __init__(self, work: dist.Work, log: OperationLog, operation: int) -> None:
        self._work, self._log, self._operation = work, log, operation

    @property
    def __class__(self) -> type:
        """Be one of torch's: FSDP2 waits for nothing else."""
        return dist.Work

    def wait(self, *timeout: Any) -> Any:
        self._log.write("wait", threading.get_native_id(), self._operation)
        return self._work.wait(*timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class OperationLog:
    """The log of one rank.

    Args:
        path: of the file; ``restart`` empties it.
        is_on_host: whether a tensor is one that NCCL could not send.
        stand_in: the backend that takes NCCL's place.
    """

    def __init__(
        self,
        path: str | Path,
        is_on_host: Callable[[Tensor], bool] = lambda x: isinstance(x, HostTensor),
        stand_in: str = "gloo",
    ) -> None:
        self._is_on_host, self._stand_in = is_on_host, stand_in
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._operations = self._batches = 0
        self._stacks: dict[tuple[Any, ...], int] = {}
        self._groups: set[str] = set()
        self._device_only: set[ProcessGroup] = set()
        self._batch_of_thread: dict[int, int] = {}

    def restart(self) -> None:
        """Forget the last job: the next one starts like a new process, without communicators."""
        os.ftruncate(self._file, 0)
        self._stacks.clear()
        self._groups.clear()

    def write(self, *record: Any) -> None:
        os.write(self._file, json.dumps(record).encode() + b"\n")

    def install(self) -> None:
        """Log all that this process asks of process groups, and let the product believe that they are NCCL's."""
        for name in COLLECTIVES:
            if hasattr(ProcessGroup, name):
                self._replace(name, self._collective)
        for name in DIRECTIONS:
            self._replace(name, self._one_way)
        dist.batch_isend_irecv = self._batch(dist.batch_isend_irecv)
        dist.get_backend_config = lambda group=None: MIXED_BACKENDS
        dist.new_group = self._new_group(dist.new_group)

    def _replace(self, name: str, wrap: Callable[..., Any]) -> None:
        original = getattr(ProcessGroup, name)
        setattr(ProcessGroup, name, functools.wraps(original)(wrap(name, original)))

    def _collective(self, name: str, original: Callable[..., Any]) -> Any:
        def call(group: ProcessGroup, *args: Any, **options: Any) -> Any:
            common = [*args, *options.values()]
            if name in ROOT_HAS_LIST:
                del common[ROOT_HAS_LIST[name]]
            what = f"{name}({_describe(common)})"
            operation = self._next_operation(group, args)
            thread = threading.get_native_id()
            self.write("call", operation, thread, group.group_name, what, self._stack())
            return self._logged(original(group, *args, **options), operation)

        return call

    def _one_way(self, name: str, original: Callable[..., Any]) -> Any:
        def call(
            group: ProcessGroup, tensors: list[Tensor], peer: int, tag: int
        ) -> Any:
            operation = self._next_operation(group, tensors)
            thread = threading.get_native_id()
            self.write(
                DIRECTIONS[name],
                operation,
                thread,
                group.group_name,
                peer,
                _describe_message(tensors),
                self._stack(),
                self._batch_of_thread.get(thread),
            )
            return self._logged(original(group, tensors, peer, tag), operation)

        return call

    def _batch(self, original: Callable[..., Any]) -> Any:
        """NCCL sends a batch through the communicator of the whole group, and all its parts at once."""

        def call(operations: list[dist.P2POp]) -> Any:
            self._batches += 1
            thread = threading.get_native_id()
            self._batch_of_thread[thread] = self._batches
            try:
                return original(operations)
            finally:
                del self._batch_of_thread[thread]

        return call

    def _new_group(self, make: Callable[..., Any]) -> Any:
        """Groups are made by all their ranks at once; those with equal ranks share one of gloo.

        gloo wakes a thread of each group a hundred times a second: a group for each
        axis of each test's grid would take a core by the end of a run.
        """
        made: dict[tuple[Any, ...], ProcessGroup] = {}
        dist.distributed_c10d._hash_ranks_to_str = _names_of_groups()

        def new_group(
            ranks: list[int] | None = None, backend: str | None = None, **options: Any
        ) -> Any:
            is_local = options.get("use_local_synchronization", False)
            everybody = list(range(dist.get_world_size()))
            callers = ranks if is_local and ranks is not None else everybody
            self._log_meeting(callers, f"new_group({ranks}, {backend})")
            real_backend = self._stand_in if backend == "nccl" else backend
            if ranks is None:
                return make(backend=real_backend, **options)
            key = (dist.group.WORLD, backend, *ranks)
            if key not in made:
                made[key] = make(ranks, backend=real_backend, **options)
                if backend == "nccl":
                    self._device_only.add(made[key])
            return made[key]

        return new_group

    def _log_meeting(self, ranks: Sequence[int], what: str) -> None:
        """Log that this rank waits on the host for ``ranks``."""
        name, thread = f"meeting {list(ranks)}", threading.get_native_id()
        self._introduce(name, ranks)
        self._operations += 1
        self.write("call", self._operations, thread, name, what, self._stack())
        self.write("wait", thread, self._operations)

    def _next_operation(self, group: ProcessGroup, args: Sequence[Any]) -> int:
        name = group.group_name
        if group in self._device_only:
            for tensor in _tensors(args):
                if self._is_on_host(tensor):
                    raise HostTensorError(
                        f"a host tensor {tuple(tensor.shape)} in a group of "
                        f"ranks {dist.get_process_group_ranks(group)} that only NCCL connects"
                    )
        if name not in self._groups:
            self._introduce(name, dist.get_process_group_ranks(group))
        self._operations += 1
        return self._operations

    def _introduce(self, name: str, ranks: Sequence[int]) -> None:
        if name not in self._groups:
            self._groups.add(name)
            self.write("group", name, list(ranks))

    def _logged(self, work: dist.Work | None, operation: int) -> Any:
        return None if work is None else LoggedWork(work, self, operation)

    def _stack(self) -> int:
        """Return the number of the caller's stack, which is written out the first time."""
        places = tuple(_places(sys._getframe(2)))
        number = self._stacks.get(places)
        if number is None:
            number = self._stacks[places] = len(self._stacks)
            lines = [
                f"  {code.co_filename}:{line} in {code.co_name}"
                for code, line in reversed(places)
            ]
            self.write("stack", number, "\n".join(lines))
        return number


def _places(frame: FrameType | None) -> Iterator[tuple[Any, int]]:
    """Yield the lines of a stack, the innermost first, without those of torch and of this harness."""
    while frame is not None and frame.f_code.co_name != "_serve":
        code = frame.f_code
        if not code.co_filename.startswith((_TORCH, _HERE)):
            yield code, frame.f_lineno
        frame = frame.f_back


def _tensors(args: Any) -> Iterator[Tensor]:
    if isinstance(args, Tensor):
        yield args
    elif isinstance(args, list | tuple):
        for arg in args:
            yield from _tensors(arg)


def _describe_message(tensors: Sequence[Tensor]) -> str:
    """Return dtypes and numbers of elements: what both ends of a message must agree on, in NCCL as in gloo."""
    parts = []
    for tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        parts.append(f"{tensor.numel()} x {dtype}")
    return ", ".join(parts)


def _describe(args: Sequence[Any]) -> str:
    """Return dtypes and shapes of tensors, with root and reduction: what the ranks of a collective must agree on."""
    parts = []
    for arg in args:
        if isinstance(arg, Tensor):
            parts.append(f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}")
        elif isinstance(arg, list | tuple):
            parts.append(f"[{_describe(arg)}]")
        elif isinstance(arg, int):
            parts.append(str(arg))
        else:
            parts += [f"root {arg.rootRank}"] if hasattr(arg, "rootRank") else []
            parts += [arg.reduceOp.op.name] if hasattr(arg, "reduceOp") else []
    return ", ".join(parts)


def _names_of_groups() -> Callable[[list[int]], str]:
    """Return what names a group that only its members make, in place of torch's function.

    torch's name has the number of groups in this process. A run makes one grid, in which
    all ranks have the same number. Here one grid comes after another, and in a pipeline
    of four only the first and the last rank have a group of the ends: from then on the
    ranks would wait for each other under different names.
    """
    times: dict[tuple[int, ...], int] = {}

    def name(ranks: list[int]) -> str:
        key = tuple(ranks)
        times[key] = times.get(key, 0) + 1
        return f"group {'_'.join(map(str, ranks))}, number {times[key]}"

    return name
