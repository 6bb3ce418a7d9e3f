"""``LossSpike``: find a loss far above its running mean."""

from __future__ import annotations

import math

WEIGHT = 0.1  # of the newest loss in the mean: about the last twenty steps count
SETTLED_AFTER = 3  # losses; the mean of fewer is not compared with


class LossSpike:
    """The running mean of the loss, and the losses that are far above it.

    Args:
        ratio: a loss above this many times the mean is a spike.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._mean = 0.0
        self._count = 0

    def exceeded_mean(self, loss: float) -> float | None:
        """Take in the loss of a step; return the mean before it if it is a spike, else None.

        A loss that is not finite or not positive changes nothing.
        """
        if not math.isfinite(loss) or loss <= 0:
            return None
        mean = self._mean
        limit = self._ratio * mean
        is_spike = self._count >= SETTLED_AFTER and loss > limit
        # One huge loss must not raise the mean so far that it hides the next spike. A
        # loss that stays on a new level becomes the mean after some steps.
        counted = min(loss, limit) if is_spike else loss
        self._count += 1
        weight = max(WEIGHT, 1 / self._count)
        self._mean += weight * (counted - mean)
        return mean if is_spike else None
