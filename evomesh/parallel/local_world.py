"""A world of processes on this machine that compute one function, and return what it returned."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from evomesh.errors import UserError
from evomesh.parallel.process_group import join_world
from evomesh.parallel.rendezvous import JobAddress

_HERE = "127.0.0.1"
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run_in_world(
    function: Callable[..., Any], ranks: int, device: str, *args: Any
) -> list[Any]:
    """Return what ``function(rank, torch_device, *args)`` returned on each of ``ranks`` ranks, which form a world.

    Args:
        function: of a module, so that new processes find it.
        device: "cpu", where each rank computes in one thread, or "cuda", of which each rank has its own.

    Raises:
        UserError: a rank has failed.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    processes = []
    pipes = []
    with _one_thread_each():
        for rank in range(ranks):
            here, there = context.Pipe()
            address = JobAddress(rank, ranks, _HERE, port)
            process = context.Process(
                target=_serve,
                args=(there, function, address, device, args),
                daemon=True,
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
    try:
        return [_answer(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        # The one that serves the store last: the others would miss it.
        for process in reversed(processes):
            process.kill()
            process.join()


def _answer(pipe: Connection, rank: int) -> Any:
    try:
        is_good, value = pipe.recv()
    except EOFError:
        is_good = False
        value = "its process has ended"
    if not is_good:
        raise UserError(
            f"rank {rank} of the measurement failed: {value}",
            where="--measure",
            expected="processes that can talk to each other on this machine",
            code="EVO-PLAN-002",
        )
    return value


def _serve(
    pipe: Connection,
    function: Callable[..., Any],
    address: JobAddress,
    device: str,
    args: tuple[Any, ...],
) -> None:
    """Join the world, compute, answer, and wait to be ended: who left first would break the connections of others."""
    place = torch.device(device)
    if device == "cuda":
        place = torch.device(device, address.rank)
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(1)
    try:
        join_world(place, address)
        value = function(address.rank, place, *args)
        pipe.send((True, value))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    with suppress(EOFError):
        pipe.recv()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that start in the ``with`` block compute in one thread."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind((_HERE, 0))
        port: int = one.getsockname()[1]
        return port
