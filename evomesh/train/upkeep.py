"""What is done every so many steps beside training: freeing caches, and naming ranks that lag behind."""

from __future__ import annotations

import gc
import logging
from statistics import median

import torch

from evomesh.parallel.collectives import all_gather_objects
from evomesh.parallel.grid import Axis

logger = logging.getLogger(__name__)

USUAL_INTERVAL = 50  # also what a documented interval of 0 or less means


class PeriodicUpkeep:
    """``data.empty_cache_and_diag_interval`` and ``data.diag_outlier_ratio``.

    Args:
        interval: steps from one time to the next.
        ratio: a rank is slow whose forward and backward took more than this times the median of its peers.
        peers: ranks that do equal work: the data-parallel axis.
    """

    def __init__(self, interval: int, ratio: float, peers: Axis) -> None:
        self.interval = interval if interval > 0 else USUAL_INTERVAL
        self.ratio, self.peers = ratio, peers
        self._seconds: list[float] = []

    def after_step(self, fwd_bwd_time: float) -> None:
        """Called once a step on every rank, with the seconds in forward and backward."""
        self._seconds.append(fwd_bwd_time)
        if len(self._seconds) < self.interval:
            return
        times = all_gather_objects(sum(self._seconds) / self.interval, self.peers)
        self._seconds.clear()
        if self.peers.rank == 0:
            for rank, seconds in slow_ranks(times, self.ratio):
                logger.warning(
                    "data-parallel rank %d is slow: %.3f s in forward and backward, %.3f s is the median of %d ranks",
                    rank,
                    seconds,
                    median(times),
                    len(times),
                )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def slow_ranks(times: list[float], ratio: float) -> list[tuple[int, float]]:
    """(rank, seconds) of those above ``ratio`` times the median."""
    usual = median(times)
    return [(rank, seconds) for rank, seconds in enumerate(times) if seconds > ratio * usual]
