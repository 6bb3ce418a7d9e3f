"""Start of a rank of any world, in one process: real code, against a store that the others have filled.

What only simulated ranks could answer, a message of gloo, is not sent.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from evomesh.config.schema import ParallelConfig
from evomesh.parallel import process_group
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


@dataclass(frozen=True)
class StartCounts:
    """Messages of one rank to the job's store.

    Attributes:
        messages: until its groups are made, on the connection of the thread that trains.
        answered: bytes of the answers to them.
        heartbeats: messages a second once all ranks have been heard, its own heartbeat included.
        heard: bytes of the answers to them.
    """

    messages: int
    answered: int
    heartbeats: int
    heard: int


class CountedStore(Store):
    """A connection to a job's store that counts what is asked of it, by Python and by torch's own code.

    Attributes:
        asked: operations of the thread that made the connection, which is the one that trains.
        asked_in_background: those of other threads: heartbeats.
        answered: bytes of values that were answered, to all threads.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.asked: Counter[str] = Counter()
        self.asked_in_background: Counter[str] = Counter()
        self.answered = 0
        self._owner = threading.get_ident()

    def _count(self, operation: str) -> None:
        is_owner = threading.get_ident() == self._owner
        counter = self.asked if is_owner else self.asked_in_background
        counter[operation] += 1


def _forward(operation: str) -> Callable[..., Any]:
    def ask(
        counted: CountedStore,
        *args: Any,
        **options: Any,
    ) -> Any:
        counted._count(operation)
        method = getattr(counted.store, operation)
        answer = method(*args, **options)
        counted.answered += _bytes_in(answer)
        return answer

    return ask


def _bytes_in(answer: Any) -> int:
    """Return the bytes of a value that a store answers, or of several."""
    if isinstance(answer, list):
        return sum(map(_bytes_in, answer))
    return len(answer) if isinstance(answer, bytes) else 0


for _operation in _OPERATIONS:
    setattr(CountedStore, _operation, _forward(_operation))


class LastToComeStore(CountedStore):
    """The store of a job in which all ranks but this one have already been everywhere.

    Args:
        store: in memory, with what the others have written.
    """

    def __init__(self, store: Store, world_size: int) -> None:
        super().__init__(store)
        self._world_size = world_size

    def add(self, key: str, amount: int) -> int:
        """Count, and answer as the last of all ranks is answered."""
        super().add(key, amount)
        return self._world_size


def simulate_start(parallel: ParallelConfig, world_size: int, rank: int) -> StartCounts:
    """Join a world whose other ranks are simulated, make the groups of a run, and count what the store is asked."""
    address = JobAddress(rank, world_size, "127.0.0.1", port=1)
    memory = HashStore()
    job = PrefixStore(address.prefix, memory)
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
        assert grid.world_size == world_size
        of_checkpoints = default_exchange()
        messages = store.asked.total()
        answered = store.answered
        watch.listen()  # the first time it asks which ranks have a heartbeat
        heard_before = second.answered
        asked_before = second.asked.total()
        watch.listen()
        of_checkpoints.close()
        dist.destroy_process_group()
    return StartCounts(
        messages=messages,
        answered=answered,
        # One more: its own heartbeat.
        heartbeats=second.asked.total() - asked_before + 1,
        heard=second.answered - heard_before,
    )


def _introduction() -> dict[str, str]:
    """Return what a rank tells the others of itself."""
    return {
        "host": "node",
        "gpu": process_group.NO_GPU,
        "process": RankProcess.of_this_one().encode(),
        "alive": "1",
    }


def _prefixed(store: Store) -> Callable[[JobAddress], Store]:
    return lambda address: PrefixStore(address.prefix, store)
