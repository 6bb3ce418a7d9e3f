"""Seconds of work that a device may still be doing when the host has moved on."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Runs from where it is made to ``stop``, on ``device``'s own clock where that is CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._started = self._now()
        self._stopped: Any = None

    def stop(self) -> None:
        self._stopped = self._now()

    def seconds(self) -> float:
        """Read it behind the step's host synchronisation: on CUDA it needs the device to have passed ``stop``."""
        assert self._stopped is not None
        if isinstance(self._started, float):
            return float(self._stopped - self._started)
        return float(self._started.elapsed_time(self._stopped)) / 1e3

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
