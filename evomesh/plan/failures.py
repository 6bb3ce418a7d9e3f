"""Failures of a run of many devices, and the best interval between its checkpoints.

Failures of a device come at random, with a mean time between them; a run ends when any
of its devices fails. With a mean time M between failures of the run, a checkpoint for
which training stands still for d, and r until a restarted run trains again:

    Young, for d much below M:   sqrt(2 d M)
    Daly, to higher order:       sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + (d / 2M) / 9) - d, and M from d = 2M on
    time of a run for each second of training, saved every t seconds:  M exp(r/M) (exp((t + d)/M) - 1) / t

Sources: J. W. Young, A first order approximation to the optimum checkpoint interval,
Communications of the ACM 17(9), 1974; J. T. Daly, A higher order estimate of the optimum
checkpoint interval for restart dumps, Future Generation Computer Systems 22(3), 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SECONDS_PER_HOUR = 3600
# Meta's report on Llama 3 (arXiv 2407.21783, section 3.3.4) counts 419 unexpected
# interruptions in 54 days on 16,384 GPUs: 50,700 hours of a GPU for each.
DEFAULT_DEVICE_HOURS = 50_000.0


@dataclass(frozen=True)
class FailureModel:
    """Costs of failures and checkpoints, in seconds.

    Attributes:
        between: mean time between failures of the run.
        stall: for which training stands still for a checkpoint.
        restart: from a failure until training continues, without the steps that are done again.
    """

    between: float
    stall: float
    restart: float

    @property
    def young(self) -> float:
        """Young's interval between checkpoints."""
        return math.sqrt(2 * self.stall * self.between)

    @property
    def daly(self) -> float:
        """Daly's interval between checkpoints."""
        ratio = self.stall / (2 * self.between)
        if ratio >= 1:
            return self.between
        correction = 1 + math.sqrt(ratio) / 3 + ratio / 9
        return self.young * correction - self.stall

    def lost_share(self, interval: float) -> float:
        """Return the share of a run's time in which it does not train, with a checkpoint every ``interval`` seconds."""
        attempt = (interval + self.stall) / self.between
        if attempt > 700 or self.restart / self.between > 700:
            return 1.0  # it never gets there
        grown = math.exp(self.restart / self.between) * math.expm1(attempt)
        run_time = self.between * grown
        return 1 - interval / run_time


def seconds_between_failures(device_hours: float, devices: int) -> float:
    """Return the mean time between failures of a run.

    Args:
        device_hours: mean time between failures of one device.
    """
    return device_hours * SECONDS_PER_HOUR / devices
