"""``history.jsonl`` of a run folder: every start of the run, every step with where its time went, every end.

Nothing is removed from it. A resumed run removes the steps that it redoes from
``metrics.jsonl``; here both are kept, so that a report can tell what the restart cost.

Each line is a JSON object:

    {"event": "start", "time": ..., "began": ..., "step": 40, "config": {...}, ...}
    {"step": 40, "time": ..., "seconds": 1.93, "phases": {"data wait": 0.01, "save": 0.2}, "memory": ...}
    {"event": "end", "time": ..., "step": 80, "outcome": "done", "phases": {"save": 0.7}}
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from evomesh.monitor.optional_output import OptionalOutput, missing_line_end

HISTORY_FILE = "history.jsonl"


class HistoryFile:
    """Writer of the history of one run; without a path it writes nothing, as on all ranks but the main one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._output = OptionalOutput(HISTORY_FILE, tries_again=True)
        self._file: IO[bytes] | None = None
        self._phases: dict[str, float] = defaultdict(float)
        self._step_began = time.perf_counter()

    def start(self, facts: dict[str, Any]) -> None:
        """Open the file and note that a start of the run begins to train; ``facts`` describe it."""
        self._output.attempt(self._open)
        self._write({"event": "start", "time": time.time()} | facts)

    def begin_step(self) -> None:
        """Note that a step begins now."""
        self._phases.clear()
        self._step_began = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block as a part of the step, under a name such as "data wait"."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] += time.perf_counter() - began

    def step_done(self, step: int, memory: int) -> None:
        """Note the time of a step, and the bytes that this rank uses at most."""
        seconds = time.perf_counter() - self._step_began
        row: dict[str, Any] = {
            "step": step,
            "time": round(time.time(), 3),
            "seconds": round(seconds, 6),
            "phases": self._rounded_phases(),
        }
        if memory:
            row["memory"] = memory
        self._write(row)
        self._phases.clear()

    def end(self, step: int, outcome: str) -> None:
        """Note how this start of the run ends, after so many steps, and close the file."""
        self._write(
            {
                "event": "end",
                "time": time.time(),
                "step": step,
                "outcome": outcome,
                "phases": self._rounded_phases(),
            }
        )
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rounded_phases(self) -> dict[str, float]:
        rounded = {}
        for name, seconds in self._phases.items():
            rounded[name] = round(seconds, 6)
        return rounded

    def _open(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)
        line_end = missing_line_end(self._path)
        if line_end:
            self._file.write(line_end)

    def _write(self, row: dict[str, Any]) -> None:
        file = self._file
        if file is None:
            return
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        encoded = line.encode(errors="backslashreplace")
        self._output.attempt(lambda: file.write(encoded))
