"""Several ranks of one save simulated by threads, with hand-made grids."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from evomesh.parallel.grid import Axis, Grid

T = TypeVar("T")
AXES = ("tp", "zero", "dp", "pp", "wp", "replica")  # inner to outer for rank numbers


class ThreadExchange:
    def __init__(
        self, rank: int, size: int, board: dict[str, Any], barrier: threading.Barrier
    ) -> None:
        self.rank, self.size, self._board, self._barrier = rank, size, board, barrier

    def gather(self, message: Any) -> list[Any] | None:
        self._board[f"m{self.rank}"] = message
        self._barrier.wait()
        result = (
            [self._board[f"m{r}"] for r in range(self.size)] if self.rank == 0 else None
        )
        self._barrier.wait()
        return result

    def broadcast(self, message: Any) -> Any:
        if self.rank == 0:
            self._board["b"] = message
        self._barrier.wait()
        result = self._board["b"]
        self._barrier.wait()
        return result

    def scatter(self, messages: list[Any] | None) -> Any:
        messages = self.broadcast(messages)
        assert messages is not None
        return messages[self.rank]

    def pass_on(
        self, data: Tensor, to: int, received: Tensor, source: int, ring_name: str
    ) -> None:
        if data.numel():
            self._mailbox(self.rank, to).put(data.clone())
        if received.numel():
            arrived = self._mailbox(source, self.rank).get(timeout=20)
            received.copy_(arrived)

    def _mailbox(self, source: int, to: int) -> queue.Queue[Tensor]:
        box: queue.Queue[Tensor] = self._board.setdefault(
            f"{source} to {to}", queue.Queue()
        )
        return box

    def twin(self) -> ThreadExchange:
        twin = self._board.setdefault(
            "twin", ({}, threading.Barrier(self.size, timeout=20))
        )
        self._barrier.wait()
        return ThreadExchange(self.rank, self.size, *twin)

    def close(self) -> None:
        return


def grids(**sizes: int) -> list[Grid]:
    """One grid per rank; axes vary fastest in the order of ``AXES``. The activation axes are left as given."""
    count = 1
    for size in sizes.values():
        count *= size
    made = []
    for rank in range(count):
        axes, rest = {}, rank
        for name in AXES:
            size = sizes.get(name, 1)
            axes[name] = Axis(name, size, rest % size)
            rest //= size
        made.append(Grid(**axes))
    return made


def run_ranks(size: int, action: Callable[[ThreadExchange], T]) -> list[T]:
    """Runs the action as every rank; an error of any rank is raised after all have ended."""
    barrier, board = threading.Barrier(size, timeout=20), {}  # type: ignore[var-annotated]
    results: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}

    def one(rank: int) -> None:
        try:
            results[rank] = action(ThreadExchange(rank, size, board, barrier))
        except BaseException as error:
            errors[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [
        e for e in errors.values() if not isinstance(e, threading.BrokenBarrierError)
    ]
    for error in real or errors.values():
        raise error
    return [results[rank] for rank in range(size)]
