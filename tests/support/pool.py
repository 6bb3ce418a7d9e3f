"""A pool of ranks that live as long as the pytest run and compute one function after the other.

def sum_of_ranks(rank, offset):                  # module level: it goes to the ranks by name
    return int(sum_over(torch.tensor(rank + offset), grid_of(tensor=4).tp))

def test_sum(pool):
    assert pool.run(sum_of_ranks, 10) == [46] * 4
"""

from __future__ import annotations

import faulthandler
import functools
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from evomesh.config.schema import ParallelConfig
from evomesh.parallel.build import build_grid
from evomesh.parallel.grid import Grid
from tests.support.forking import context

RANKS = 4
GRACE = 2.0  # seconds that the other ranks get to report too, once one has failed


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds each rank's traceback or stack."""


@functools.cache
def grid_of(
    *,
    tensor: int = 1,
    mode: str = "mtp",
    pipeline: int = 1,
    weight: int = 1,
    zero1: int = -1,
) -> Grid:
    """In a rank: the grid of these sizes over its world; made once, then kept."""
    parallel = ParallelConfig.model_validate(
        {
            "tensor": {"size": tensor, "mode": mode},
            "pipeline": {"size": pipeline},
            "weight": {"size": weight},
            "zero1": {"size": zero1},
        }
    )
    return build_grid(parallel, dist.get_world_size(), dist.get_rank())


@dataclass
class _Rank:
    process: BaseProcess
    connection: Connection
    stderr: Path


class Pool:
    """Worlds of gloo processes, one for each number of ranks; started when first asked for, again after a failure."""

    def __init__(self) -> None:
        self._worlds: dict[int, list[_Rank]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="ranks"))

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int = RANKS,
        timeout: float = 60.0,
    ) -> list[Any]:
        """Calls ``function(rank, *args)`` on ranks 0 .. ``ranks`` - 1 and returns their results in order.

        Args:
            function: a module-level function.
            args: picklable.
            timeout: seconds; after them the pool is killed and the stacks of its ranks are shown.

        Raises:
            RankError: with every failing rank's traceback.
        """
        if ranks not in self._worlds:
            self._start(ranks)
        job = pickle.dumps((function, args))
        workers = self._worlds[ranks]
        for worker in workers:
            worker.connection.send_bytes(job)
        answers = self._collect(workers, timeout)
        if len(answers) == ranks and all(good for good, _ in answers.values()):
            return [answers[rank][1] for rank in range(ranks)]
        message = self._explain(workers, answers, timeout)
        # The others may be inside a collective: a fresh world for the next test.
        self._end(ranks)
        raise RankError(message)

    def close(self) -> None:
        for ranks in list(self._worlds):
            self._end(ranks)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, ranks: int) -> None:
        workers = self._worlds.pop(ranks)
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()

    def _start(self, ranks: int) -> None:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        workers = []
        for rank in range(ranks):
            here, there = context().Pipe()
            stderr = folder / f"stderr{rank}"
            stderr.touch()
            process = context().Process(
                target=_serve, args=(rank, ranks, str(folder), there), daemon=True
            )
            process.start()
            there.close()
            workers.append(_Rank(process, here, stderr))
        self._worlds[ranks] = workers

    def _collect(
        self, workers: list[_Rank], timeout: float
    ) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        pending = {worker.connection: index for index, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                index = pending.pop(connection)
                try:
                    answers[index] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    workers[index].process.join(GRACE)
                    answers[index] = (
                        False,
                        f"died with exit code {workers[index].process.exitcode}",
                    )
                if not answers[index][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _explain(
        self, workers: list[_Rank], answers: dict[int, tuple[bool, Any]], timeout: float
    ) -> str:
        silent = [index for index in range(len(workers)) if index not in answers]
        for index in silent:
            pid = workers[index].process.pid
            assert pid is not None
            os.kill(pid, signal.SIGUSR1)  # faulthandler writes the stack to its stderr
        time.sleep(0.2 if silent else 0)
        lines = []
        for index, worker in enumerate(workers):
            if index in silent:
                lines.append(
                    f"--- rank {index}: no answer (limit {timeout:g} s)\n{worker.stderr.read_text()[-4000:]}"
                )
            elif not answers[index][0]:
                lines.append(
                    f"--- rank {index}: {answers[index][1]}\n{worker.stderr.read_text()[-2000:]}"
                )
        return "\n".join(lines)


def _serve(rank: int, ranks: int, folder: str, connection: Connection) -> None:
    """The life of one rank: join the group, then answer jobs until the pipe closes."""
    descriptor = os.open(
        f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    )
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    _share_groups()
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(job)
            answer = pickle.dumps((True, function(rank, *args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def _share_groups() -> None:
    """Lets all grids of this world have one group for the same members.

    gloo wakes a thread of each group a hundred times a second: a group for each axis of each test's grid would take
    a core by the end of a run.
    """
    make, made = dist.new_group, dict[tuple[int, ...], dist.ProcessGroup]()

    def new_group(ranks: list[int] | None = None, **options: Any) -> Any:
        if ranks is None:
            return make(**options)
        key = tuple(ranks)
        if key not in made:
            made[key] = make(ranks, **options)
        return made[key]

    dist.new_group = new_group
