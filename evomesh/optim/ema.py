"""An exponential moving average of the weights beside the masters, sharded as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomesh.config.optimizer import EmaConfig
from evomesh.optim.rule import overwrite


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

    def after_step(self, is_left_out: Tensor | None = None) -> None:
        """Take part of the present weights into the average, if a step is due.

        Args:
            is_left_out: bool scalar; if it is true, no average changes, and the host need not know.
        """
        self.calls += 1
        if self.calls % self.config.every:
            return
        weight = 1 - self.decay
        if is_left_out is None:
            masters = list(self.averages)
            averages = list(self.averages.values())
            torch._foreach_lerp_(averages, masters, weight)
            return
        for master, average in self.averages.items():
            moved = average.lerp(master, weight)
            overwrite(average, moved, is_left_out)
