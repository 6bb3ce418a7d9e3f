"""The tail of stragglers: every step takes as long as its slowest rank, and of many ranks one is always slow.

The time of a rank for a step is drawn anew in every step, independently of the others.
With the distribution F of one rank, that of the slowest of N is F to the power of N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomesh.errors import UserError

JitterKind = Literal["normal", "lognormal", "exponential"]
KINDS: tuple[JitterKind, ...] = ("normal", "lognormal", "exponential")
_POINTS = 20_001
# Beyond, no rank of a million is in a million steps.
_DEVIATIONS = 9.0


@dataclass(frozen=True)
class StepJitter:
    """Distribution of the time of a rank for a step, whose usual value is 1.

    Attributes:
        spread: "normal" and "lognormal": standard deviation of the time or of its logarithm; "exponential": the mean
            of what is added to 1.
    """

    kind: JitterKind
    spread: float

    @staticmethod
    def parse(text: str) -> StepJitter:
        """Read KIND:SPREAD, such as ``lognormal:0.02``.

        Raises:
            UserError: another kind, or no spread from 0 to 1.
        """
        name, _, number = text.partition(":")
        for kind in KINDS:
            if kind != name:
                continue
            try:
                spread = float(number)
            except ValueError:
                break
            if 0 <= spread <= 1:
                return StepJitter(kind, spread)
        raise UserError(
            f"no distribution {text!r}",
            where="--jitter",
            expected=f"one of {', '.join(KINDS)}, a colon and a spread from 0 to 1, such as lognormal:0.02",
            code="EVO-CLI-002",
        )

    def slowest_of(self, ranks: int) -> float:
        """Return the expected time of the slowest of so many ranks, over that of one rank."""
        return self._expected_maximum(ranks) / self._expected_maximum(1)

    def _expected_maximum(self, ranks: int) -> float:
        if self.spread == 0:
            return 1.0
        if self.kind == "exponential":
            # The gaps between the ordered times of N ranks have the means 1/N, ..., 1/2, 1.
            counts = np.arange(1, ranks + 1)
            harmonic = np.sum(1 / counts)
            return float(1 + self.spread * harmonic)
        return self._integrated_maximum(ranks)

    def _integrated_maximum(self, ranks: int) -> float:
        deviations = np.linspace(-_DEVIATIONS, _DEVIATIONS, _POINTS)
        changes = self.spread * deviations
        times = 1 + changes
        if self.kind == "lognormal":
            times = np.exp(changes)
        root = math.sqrt(2)
        tails = _NORMAL_TAIL(deviations / root)
        above = tails / 2
        # At the very bottom all are above.
        with np.errstate(divide="ignore"):
            log_below = np.log1p(-above)
        all_below = np.exp(ranks * log_below)
        # The mean is the lowest value and the integral of what is above each value.
        some_above = 1 - all_below
        longer = np.trapezoid(some_above, times)
        lowest = times[0]
        return float(lowest + longer)


_NORMAL_TAIL: Callable[[NDArray[np.float64]], NDArray[np.float64]] = np.vectorize(
    math.erfc, otypes=[np.float64]
)
