"""Timed collectives: how long messages of a given size take on one axis, the best of a few."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.parallel.grid import Axis


@dataclass(frozen=True)
class MessageTime:
    """Seconds that one all-reduce of ``nbytes`` bytes takes on an axis of ``ranks`` ranks."""

    nbytes: int
    seconds: float
    ranks: int

    @property
    def bandwidth(self) -> float:
        """Return bytes per second over each rank's link, whatever the number of ranks.

        A ring moves each byte 2 (n - 1) / n times over the link of every rank, as the
        tests of NCCL count their "bus bandwidth".
        """
        moved = self.nbytes * 2 * (self.ranks - 1) / self.ranks
        return moved / self.seconds


def all_reduce_seconds(
    axis: Axis, device: torch.device, nbytes: int, repeats: int = 5
) -> float:
    """Return the seconds of one all-reduce of ``nbytes`` bytes; every rank of the axis calls it.

    The first call is not counted: connections are made in it.
    """
    message = torch.zeros(max(nbytes // 4, 1), dtype=torch.float32, device=device)
    return best_seconds(lambda: all_reduce_no_grad(message, axis), device, repeats)


def time_messages(
    axis: Axis, device: torch.device, sizes: tuple[int, ...], repeats: int = 5
) -> list[MessageTime]:
    """Time an all-reduce of each of ``sizes`` bytes; every rank of the axis calls it."""
    times = []
    for nbytes in sizes:
        seconds = all_reduce_seconds(axis, device, nbytes, repeats)
        times.append(MessageTime(nbytes, seconds, axis.size))
    return times


def best_seconds(
    work: Callable[[], object], device: torch.device, repeats: int = 5
) -> float:
    """Return the fewest seconds that ``work`` took on ``device`` in ``repeats`` runs after one that warms up."""
    work()
    _finish(device)
    fewest = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        _finish(device)
        fewest = min(fewest, time.perf_counter() - started)
    return fewest


def _finish(device: torch.device) -> None:
    """Wait until the device has done what the host has queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
