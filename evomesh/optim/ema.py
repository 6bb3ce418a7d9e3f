"""An exponential moving average of the weights beside the masters, sharded as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomesh.config.optimizer import EmaConfig


class WeightEma:
    """Averages the masters every few steps.

    Attributes:
        averages: the average of each master.
        calls: optimizer steps so far, skipped ones included: the host knows their number without a device.
    """

    def __init__(self, masters: Sequence[Tensor], config: EmaConfig) -> None:
        assert config.decay is not None
        self.config = config
        self.decay = config.decay
        self.averages = {master: master.clone() for master in masters}
        self.calls = 0

    def after_step(self) -> None:
        """Take part of the present weights into the average, if a step is due."""
        self.calls += 1
        if self.calls % self.config.every == 0:
            averages = list(self.averages.values())
            torch._foreach_lerp_(averages, list(self.averages), 1 - self.decay)
