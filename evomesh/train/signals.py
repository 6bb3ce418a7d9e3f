"""Signals as a request that the loop answers between two steps and, but for pipelines, two micro-batches."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from evomesh.errors import EXIT_RESTART

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_INTERRUPTED = 128 + signal.SIGINT


class StopRequest:
    """While entered, the first Ctrl-C, SIGTERM or SIGUSR1 is only noted; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in WATCHED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; 75, "start me again", when a scheduler took the machine away."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_RESTART
