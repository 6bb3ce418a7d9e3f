"""Ways in which a rank hangs, planted into a real training run by a line in its config.

from tests.support.hang_faults import plant
plant("endless loop in C", rank=1, step=5)

The rank prints ``planted`` when it begins to hang.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

# Kind -> what the sentence must say of the rank.
WORDS = {
    "stopped": "is stopped by a signal",
    "stopped while it starts the watcher": "is stopped by a signal",
    "endless loop in Python": "computes without progress (an endless loop?)",
    "endless loop in C": "computes without progress (an endless loop?) and holds Python's lock",
    "skipped collective": "it skips a collective, or calls them in another order",
    "other order": "it skips a collective, or calls them in another order",
    "file system": "waits for a file system that does not answer",
    "dead data worker": "waits for data, and its data worker is dead",
}


def plant(kind: str, rank: int, step: int) -> None:
    """Make ``rank`` hang in ``step``; the collectives of the kinds about order are added to every rank."""
    own = int(os.environ.get("RANK", "0"))
    if "collective" in kind or "order" in kind:
        _before_step(
            lambda at: _two_collectives(kind, is_odd=own == rank and at == step)
        )
        return
    if own != rank:
        return
    if kind == "stopped while it starts the watcher":
        _stop_as_starter()
    elif kind == "file system":
        _stop_in_files(step)
    elif kind == "dead data worker":
        _kill_data_worker(step)
    else:
        hang = {
            "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "endless loop in Python": _loop_in_python,
            "endless loop in C": _loop_in_c,
        }[kind]
        _before_step(lambda at: _begin(hang) if at == step else None)


def _begin(hang: Callable[[], object]) -> None:
    print("planted", flush=True)
    hang()


def _loop_in_python() -> None:
    number = 0
    while True:
        number += 1


def _loop_in_c() -> None:
    re.match(r"(a?){40}a{40}", "a" * 40)  # holds Python's lock for years


def _block() -> None:
    """Wait in the kernel for what never comes, as for a server that is gone."""
    reader, _ = os.pipe()
    os.read(reader, 1)


def _before_step(act: Callable[[int], object]) -> None:
    """Call ``act`` with the number of each step, between the data and the forward."""
    from evomesh.train import trainer

    original = trainer.seed_step

    def seed_step(seed: int, step: int, dp_rank: int) -> None:
        act(step)
        original(seed, step, dp_rank)

    trainer.seed_step = seed_step


def _two_collectives(kind: str, is_odd: bool) -> None:
    import torch
    import torch.distributed as dist

    from evomesh.parallel.collectives import all_gather_no_grad, all_reduce_no_grad
    from evomesh.parallel.grid import Axis

    world = Axis("dp", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)

    def reduce() -> None:
        all_reduce_no_grad(torch.zeros(5), world)

    def gather() -> None:
        all_gather_no_grad(torch.zeros(64), world)

    calls = [reduce, gather]
    if is_odd:
        print("planted", flush=True)
        calls = [gather, reduce] if kind == "other order" else [gather]
    for call in calls:
        call()


def _stop_as_starter() -> None:
    """Stop where this rank is about to start the watcher of its host."""
    from evomesh.parallel import hang_watch

    original = hang_watch.start_watcher

    def start_watcher(options: Any) -> Any:
        _begin(lambda: os.kill(os.getpid(), signal.SIGSTOP))
        return original(options)

    hang_watch.start_watcher = start_watcher


def _stop_in_files(step: int) -> None:
    """Let the first write of the save after ``step`` never return."""
    from evomesh.storage import local

    original = local.SystemCalls.write

    def write(self: Any, file: int, data: memoryview) -> int:
        _begin(_block)
        return original(self, file, data)

    def arm(at: int) -> None:
        if at == step:
            local.SystemCalls.write = write  # type: ignore[method-assign]

    _before_step(arm)


def _kill_data_worker(step: int) -> None:
    """Let the worker that reads the batch after ``step`` end without a result."""
    from evomesh.data.packing.loader import PackStream

    original = PackStream._submit
    taken = 0

    def submit(self: PackStream, packs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken <= step:
            return original(self, packs)
        assert self._pool is not None
        self._pool.shutdown(wait=True)
        print("planted", flush=True)
        never: Future[Any] = Future()
        return never.result

    PackStream._submit = submit  # type: ignore[method-assign]
