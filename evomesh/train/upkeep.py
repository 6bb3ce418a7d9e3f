"""Work between steps: collecting garbage, freeing caches, and reporting slow ranks."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from evomesh.parallel.collectives import all_gather_objects
from evomesh.parallel.grid import Axis

logger = logging.getLogger(__name__)

DEFAULT_INTERVAL = 50  # also for an interval of 0 or less, as in InternEvo


@contextmanager
def garbage_at_fixed_steps() -> Iterator[None]:
    """Leave the search for garbage to ``PeriodicUpkeep``, which does it after the same steps on every rank.

    Python would search whenever it has made enough objects: on a thousand ranks in a
    thousand different places, and each time the others wait. What exists already, such
    as modules and the model, is exempt.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


class PeriodicUpkeep:
    """Collects garbage after each step, of which all but the newest every so many steps.

    Implements ``data.empty_cache_and_diag_interval`` and ``data.diag_outlier_ratio``.

    Args:
        interval: steps between two rounds.
        ratio: a rank is slow when its forward and backward took more than this times the median of its peers.
        peers: the axis whose ranks do equal work (data parallel).
    """

    def __init__(self, interval: int, ratio: float, peers: Axis) -> None:
        self.interval = interval if interval > 0 else DEFAULT_INTERVAL
        self.ratio, self.peers = ratio, peers
        self._seconds: list[float] = []

    def after_step(self, fwd_bwd_time: float) -> None:
        """Count one step; every rank calls it with the seconds it spent in forward and backward."""
        # Cycles of this step, whose tensors may be large; they are few objects.
        gc.collect(0)
        self._seconds.append(fwd_bwd_time)
        if len(self._seconds) < self.interval:
            return
        times = all_gather_objects(sum(self._seconds) / self.interval, self.peers)
        self._seconds.clear()
        if self.peers.rank == 0:
            for rank, seconds in slow_ranks(times, self.ratio):
                logger.warning(
                    "data-parallel rank %d is slow: forward and backward took %.3f s (median of %d ranks: %.3f s)",
                    rank,
                    seconds,
                    len(times),
                    median(times),
                )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def slow_ranks(times: list[float], ratio: float) -> list[tuple[int, float]]:
    """Return (rank, seconds) of the ranks above ``ratio`` times the median."""
    limit = ratio * median(times)
    return [(rank, seconds) for rank, seconds in enumerate(times) if seconds > limit]
