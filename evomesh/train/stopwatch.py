"""Timing of work that may still run on a device after the host has queued it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Measures from its creation to ``stop``, with CUDA events where ``device`` is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._started = self._now()
        self._stopped: Any = None

    def stop(self) -> None:
        self._stopped = self._now()

    def seconds(self) -> float:
        """Return the seconds. On CUDA, call it after the step's host sync, when the device has passed ``stop``."""
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
