"""What a rank asks of the job's store, which collectives it calls, and how many sockets it holds."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.utils._python_dispatch import TorchDispatchMode

from evomesh.config.schema import ParallelConfig
from evomesh.parallel import exchange, process_group, rendezvous
from evomesh.parallel.build import build_grid
from evomesh.parallel.exchange import default_exchange
from evomesh.parallel.peer_watch import PeerWatch
from evomesh.parallel.rank_process import RankProcess
from evomesh.parallel.rendezvous import JobAddress

# What torch asks of any store, gloo's own rendezvous included.
_OPERATIONS = (
    "set",
    "get",
    "add",
    "compare_set",
    "check",
    "wait",
    "multi_get",
    "multi_set",
    "append",
    "delete_key",
    "num_keys",
)
_POLLED = ("add", "check")


class CountedStore(dist.Store):
    """A connection to a job's store that counts what is asked of it, by Python and by torch's own code.

    Attributes:
        asked: operations of the thread that made the connection, which is the one that trains.
        asked_in_background: those of other threads: heartbeats.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self.store = store
        self.asked: Counter[str] = Counter()
        self.asked_in_background: Counter[str] = Counter()
        self._owner = threading.get_ident()

    def _count(self, operation: str) -> None:
        is_owner = threading.get_ident() == self._owner
        counter = self.asked if is_owner else self.asked_in_background
        counter[operation] += 1


def _forward(operation: str) -> Callable[..., Any]:
    def ask(counted: CountedStore, *args: Any, **options: Any) -> Any:
        counted._count(operation)
        return getattr(counted.store, operation)(*args, **options)

    return ask


for _operation in _OPERATIONS:
    setattr(CountedStore, _operation, _forward(_operation))


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives that this thread calls.

    Attributes:
        of_tensors: of what is on the device: gradients, weights, norm, counts.
        of_host: of objects and of the messages of an exchange, which are in host memory on CUDA too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of_tensors = 0
        self.of_host = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            if _is_called_for_host():
                self.of_host += 1
            else:
                self.of_tensors += 1
        return func(*args, **(kwargs or {}))


def _is_called_for_host() -> bool:
    """Return whether a function for objects or a method of an exchange is on the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        is_of_objects = "_object" in code.co_name and "distributed" in code.co_filename
        if is_of_objects or code.co_filename == exchange.__file__:
            return True
        frame = frame.f_back
    return False


class WorldCounts:
    """What one rank has asked of the others so far."""

    def __init__(self) -> None:
        self.stores: list[CountedStore] = []
        self.collectives = CollectiveCounter()

    def open_store(self, *args: Any, **options: Any) -> CountedStore:
        """Open a connection that counts."""
        store = CountedStore(TCPStore(*args, **options))
        self.stores.append(store)
        return store

    def now(self) -> dict[str, int]:
        """Return all counts; polls are what is asked ten times a second until all ranks are there."""
        asked: Counter[str] = Counter()
        background = 0
        for store in self.stores:
            asked += store.asked
            background += store.asked_in_background.total()
        polls = sum(asked[operation] for operation in _POLLED)
        return {
            "store": asked.total() - polls,
            "polls": polls,
            "heartbeats": background,
            "tensors": self.collectives.of_tensors,
            "host": self.collectives.of_host,
            "sockets": open_sockets(),
        }


@contextmanager
def counting_world() -> Iterator[WorldCounts]:
    """Count what this process asks of its job from here on."""
    counts = WorldCounts()
    with (
        patch.object(rendezvous, "TCPStore", counts.open_store),
        counts.collectives,
    ):
        yield counts


def open_sockets() -> int:
    """Return how many sockets this process holds."""
    sockets = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        # Other threads close theirs meanwhile.
        with suppress(FileNotFoundError):
            sockets += os.readlink(descriptor).startswith("socket:")
    return sockets


class LastToComeStore(CountedStore):
    """The store of a job in which all ranks but this one have already been everywhere.

    Args:
        store: in memory, with what the others have written.
    """

    def __init__(self, store: dist.Store, world_size: int) -> None:
        super().__init__(store)
        self._world_size = world_size

    def add(self, key: str, amount: int) -> int:
        """Count, and answer as the last of all ranks is answered."""
        super().add(key, amount)
        return self._world_size


def simulate_start(
    parallel: ParallelConfig, world_size: int, rank: int
) -> dict[str, int]:
    """Join a world whose other ranks are simulated, make the groups of a run, and count what the store is asked.

    All code runs, gloo's too; what only simulated ranks could answer, a message of gloo, is not sent.

    Returns:
        ``start``: messages on the main connection; ``heartbeats``: a second, once all ranks have been heard.
    """
    address = JobAddress(rank, world_size, "127.0.0.1", port=1)
    memory = dist.HashStore()
    job = dist.PrefixStore(address.prefix, memory)
    for other in range(world_size):
        for key, value in _introduction().items():
            job.set(f"{key}/{other}", value)
    store, second = (LastToComeStore(memory, world_size) for _ in range(2))
    with (
        patch.object(process_group, "open_store", _prefixed(store)),
        patch.object(process_group, "second_connection", _prefixed(second)),
        patch.object(PeerWatch, "start", lambda watch: None),
        patch.object(process_group, "choose_gloo_interface", lambda host: None),
    ):
        watch = process_group.join_world(torch.device("cpu"), address)
        assert watch is not None
        grid = build_grid(parallel, world_size, rank)
        assert grid.dp.size * grid.tp.size * grid.pp.size == world_size
        of_checkpoints = default_exchange()
        start = store.asked.total()
        watch._listen()  # the first time it asks which ranks have a heartbeat
        heard = second.asked.total()
        watch._listen()
        of_checkpoints.close()
        dist.destroy_process_group()
    # One more: its own heartbeat.
    return {"start": start, "heartbeats": second.asked.total() - heard + 1}


def _introduction() -> dict[str, str]:
    """Return what a rank tells the others of itself."""
    return {
        "host": "node",
        "gpu": process_group.NO_GPU,
        "process": RankProcess.of_this_one().encode(),
        "alive": "1",
    }


def _prefixed(store: dist.Store) -> Callable[[JobAddress], dist.Store]:
    return lambda address: dist.PrefixStore(address.prefix, store)
