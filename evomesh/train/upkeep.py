"""Work between steps: collecting garbage, freeing caches, and a look for slow ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from evomesh.train.diagnosis import Diagnosis

DEFAULT_INTERVAL = 50  # also for an interval of 0 or less, as in InternEvo


@contextmanager
def garbage_at_fixed_steps() -> Iterator[None]:
    """Leave the search for garbage to ``PeriodicUpkeep``, which does it after the same steps on every rank.

    Python would search whenever it has made enough objects: on a thousand ranks in a
    thousand different places, and each time the others wait. What exists already, such
    as modules and the model, is exempt. What a program had exempted before stays so.
    """
    was_enabled = gc.isenabled()
    was_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


class PeriodicUpkeep:
    """Collects garbage after each step, of which all but the newest every so many steps, with a diagnosis.

    Implements ``data.empty_cache_and_diag_interval``.

    Args:
        interval: steps between two rounds.
        diagnosis: finds slow ranks; takes part in a round on every rank.
    """

    def __init__(self, interval: int, diagnosis: Diagnosis) -> None:
        self.interval = interval if interval > 0 else DEFAULT_INTERVAL
        self.diagnosis = diagnosis
        self._seconds: list[float] = []

    def after_step(self, fwd_bwd_time: float) -> None:
        """Count one step; every rank calls it with the seconds it spent in forward and backward."""
        # Cycles of this step, whose tensors may be large; they are few objects.
        gc.collect(0)
        self._seconds.append(fwd_bwd_time)
        if len(self._seconds) < self.interval:
            return
        mean = sum(self._seconds) / self.interval
        self._seconds.clear()
        self.diagnosis.run(mean)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
