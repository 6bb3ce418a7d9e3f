"""A pool of ranks that live as long as the pytest run and compute one function after the other.

They talk through gloo, but every job is held to NCCL's rules (``nccl_model.py``).

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
from tests.support.nccl_log import OperationLog
from tests.support.nccl_model import RuleError, check_rules

RANKS = 4
LOOK_AT_LOGS = 1.0  # seconds without an answer, after which the logs may tell why
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
    log: Path


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
        all_ended = set(range(ranks))
        violation = _violation(_read_logs(workers), all_ended)
        all_good = len(answers) == ranks and all(good for good, _ in answers.values())
        if all_good and not violation:
            return [answers[rank][1] for rank in range(ranks)]
        message = self._explain(workers, answers, timeout)
        # A rank may be inside a collective, or have launched one that another never joins:
        # the next test gets a fresh world.
        self._end(ranks)
        raise RankError(f"{violation}\n{message}")

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
            log = _log_of(folder, rank)
            log.touch()
            process = context().Process(
                target=_serve, args=(rank, ranks, str(folder), there), daemon=True
            )
            process.start()
            there.close()
            workers.append(_Rank(process, here, stderr, log))
        self._worlds[ranks] = workers

    def _collect(
        self, workers: list[_Rank], timeout: float
    ) -> dict[int, tuple[bool, Any]]:
        """Wait for the ranks' answers, until all have come, the time is over or NCCL would hang."""
        answers: dict[int, tuple[bool, Any]] = {}
        pending = {worker.connection: index for index, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout
        logs: dict[int, list[str]] = {}
        while pending:
            left = max(0.0, deadline - time.monotonic())
            ready = wait(list(pending), min(left, LOOK_AT_LOGS))
            if not ready:
                before, logs = logs, _read_logs(workers)
                stands_still = logs == before
                if left == 0.0 or (stands_still and _violation(logs, set(answers))):
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


def _log_of(folder: Path, rank: int) -> Path:
    return folder / f"log{rank}"


def _read_logs(workers: list[_Rank]) -> dict[int, list[str]]:
    """Return the lines that each rank has logged of this job."""
    logs = {}
    for rank, worker in enumerate(workers):
        logs[rank] = worker.log.read_text().splitlines(keepends=True)
    return logs


def _violation(logs: dict[int, list[str]], ended: set[int]) -> str:
    """Return what the ranks did that NCCL does not allow, with their stacks; "" if nothing."""
    try:
        check_rules(logs, ended)
    except RuleError as error:
        return str(error)
    return ""


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
    log = OperationLog(_log_of(Path(folder), rank))
    log.install()
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        log.restart()
        try:
            function, args = pickle.loads(job)
            answer = pickle.dumps((True, function(rank, *args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
