"""Times of messages of each kind on an axis, with all ranks of the world sending at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from evomesh.parallel.collectives import (
    all_gather_no_grad,
    all_reduce_no_grad,
    all_to_all_no_grad,
    broadcast_from,
    launch_send,
    receive,
    reduce_scatter_no_grad,
)
from evomesh.parallel.grid import Axis

OPERATIONS = (
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "send",
)
# Seconds that no message falls short of.
_SHORTEST = 1e-6
_FEWEST = 4
_MOST = 40
# The computation before each message: some products of square matrices, a millisecond of one core.
_PRODUCTS = 3
_PRODUCT_SIZE = 256
_COMPUTATIONS = 200
_ITEMSIZE = 4  # of float32


class MessageTimes:
    """Times messages as they are in a step: after a computation, in which ranks drift apart and threads fall asleep.

    What the computation takes when all ranks compute is left out.
    """

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self._axis = axis
        self._device = device
        self._matrix = torch.ones(
            _PRODUCT_SIZE,
            _PRODUCT_SIZE,
            device=device,
        )
        self._product = torch.empty_like(self._matrix)
        self._meet()
        seconds = self._seconds_of(
            self._compute,
            _COMPUTATIONS,
        )
        self._computing = self._mean(seconds)

    def seconds(self, operation: str, nbytes: int, limit_s: float) -> float:
        """Return the mean time of a message of ``nbytes`` bytes of one copy of the whole value.

        Every rank of the axis calls it.
        """
        message = _Message(self._axis, self._device, nbytes)
        send = message.sender(operation)
        send()
        once = self._seconds_of(send, 1)
        once = self._mean(once) + self._computing
        repeats = int(limit_s / once)
        repeats = max(repeats, _FEWEST)
        repeats = min(repeats, _MOST)

        def compute_and_send() -> None:
            self._compute()
            send()

        self._meet()
        seconds = self._seconds_of(
            compute_and_send,
            repeats,
        )
        whole = self._mean(seconds)
        sending = whole - self._computing
        return max(sending, _SHORTEST)

    def _compute(self) -> None:
        for _ in range(_PRODUCTS):
            torch.mm(self._matrix, self._matrix, out=self._product)

    def _meet(self) -> None:
        self._mean(0.0)

    def _mean(self, seconds: float) -> float:
        """Return the mean of the ranks, which all of them know."""
        own = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        total = all_reduce_no_grad(own, self._axis)
        return float(total) / self._axis.size

    def _seconds_of(self, work: Callable[[], object], repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - started) / repeats


class _Message:
    """A message of ``nbytes`` bytes of one copy of the whole value."""

    def __init__(self, axis: Axis, device: torch.device, nbytes: int) -> None:
        self._axis = axis
        ranks = axis.size
        rows = nbytes // (_ITEMSIZE * ranks)
        rows = max(rows, 1)
        self._own = torch.zeros(rows, device=device)
        self._whole = torch.zeros(
            rows * ranks,
            device=device,
        )
        self._rows = self._whole.view(ranks, rows)

    def sender(self, operation: str) -> Callable[[], object]:
        """Return what sends it once by an operation."""
        senders: dict[str, Callable[[], object]] = {
            "all_gather": self._gather,
            "reduce_scatter": self._reduce_scatter,
            "all_reduce": self._reduce,
            "all_to_all": self._exchange,
            "broadcast": self._broadcast,
            "send": self._pass_on,
        }
        return senders[operation]

    def _gather(self) -> None:
        all_gather_no_grad(self._own, self._axis)

    def _reduce_scatter(self) -> None:
        reduce_scatter_no_grad(self._whole, self._axis)

    def _reduce(self) -> None:
        all_reduce_no_grad(self._whole, self._axis)

    def _exchange(self) -> None:
        all_to_all_no_grad(self._rows, self._axis, 0, 1)

    def _broadcast(self) -> None:
        broadcast_from(self._whole, self._axis)

    def _pass_on(self) -> None:
        """Send to the next rank what the one before it sends: every rank sends and receives at the same time."""
        axis = self._axis
        into = torch.empty_like(self._whole)
        following = axis.rank + 1
        previous = axis.rank - 1
        work = launch_send(
            self._whole,
            axis,
            following % axis.size,
        )
        receive(
            into,
            axis,
            previous % axis.size,
        )
        assert work is not None
        work.wait()
