"""What a rank asks of the job's store, which collectives it calls, and how many sockets it holds."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

from torch._C._distributed_c10d import TCPStore
from torch.utils._python_dispatch import TorchDispatchMode

from evomesh.parallel import exchange, rendezvous
from evomesh.parallel.start_up import CountedStore

_POLLED = ("add", "check")


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
