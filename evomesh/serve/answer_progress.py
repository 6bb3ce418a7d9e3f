"""The chat page's status line: tokens and times of an answer."""

from __future__ import annotations

import time

from evomesh.serve.detokenizer import TextDelta

FINISH_REASONS = {
    "stop": "end of answer",
    "length": "maximum length reached",
    "stopped": "stopped",
}


class AnswerProgress:
    """Tokens and times of an answer, for the status line."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.new_tokens = 0
        self.finish = ""  # "stop", "length", "stopped" by the user, or "" while the answer continues
        self._started = self._first = self._last = time.perf_counter()

    def add(self, delta: TextDelta) -> None:
        """Count the next delta."""
        self._last = time.perf_counter()
        if self.new_tokens == 0:
            self._first = self._last
        self.new_tokens = delta.tokens
        self.finish = delta.finish

    def status(self) -> str:
        """Return the status line."""
        seconds = self._last - self._first
        speed = "…"
        if self.new_tokens > 1 and seconds > 0:
            speed = f"{(self.new_tokens - 1) / seconds:.1f}"
        parts = [
            f"{self.prompt_tokens} prompt tokens",
            f"first token after {self._first - self._started:.2f} s",
            f"{self.new_tokens} new tokens",
            f"{speed} tokens/s",
        ]
        if self.finish:
            parts.append(FINISH_REASONS[self.finish])
        return " · ".join(parts)
