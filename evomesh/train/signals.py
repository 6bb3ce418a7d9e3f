"""Signals as requests that the training loop answers after a step or, without a pipeline, between micro-batches."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from evomesh.errors import EXIT_RESTART

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_INTERRUPTED = 128 + signal.SIGINT


class StopRequest:
    """Context manager that records the first Ctrl-C, SIGTERM or SIGUSR1; a second Ctrl-C interrupts immediately."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in WATCHED:
            self._previous_handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """The exit code: 130 after Ctrl-C, 75 ("start me again") after a signal of a scheduler."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_RESTART
