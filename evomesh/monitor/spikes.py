"""``spikes.jsonl`` of a run folder: every spike, what was done about it, and which packs may have caused it.

Nothing is removed from it. A line is a JSON object with an ``event``:

    {"event": "spike", "time": ..., "step": 104, "what": ["loss"], "loss": 9.1, "grad_norm": 3.2,
     "zscore": {"loss": 41.0, "grad_norm": 2.1}, "limit": {...}, "median": {...}, "window": 104,
     "applied": false, "policy": "skip", "action": "skipped", "left_out": [104]}
    {"event": "court", "time": ..., "step": 104, "micro_batches": [...], "layers": [...]}
    {"event": "rollback", "time": ..., "step": 104, "to": 100, "left_out": [104]}
    {"event": "new run", "time": ...}

The last one stands where a run that resumes nothing writes into the folder of an earlier
one, whose lines no longer count. Numbers that are not finite are the words NaN and Infinity.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evomesh.config.json_codec import float_word
from evomesh.monitor.optional_output import OptionalOutput, missing_line_end

SPIKES_FILE = "spikes.jsonl"
NEW_RUN = "new run"


class SpikeLog:
    """Writer of the spikes of one run; without a path it writes nothing, as on all ranks but the main one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._output = OptionalOutput(SPIKES_FILE, tries_again=True)

    def begin(self) -> None:
        """Note that a run begins which does not continue the one that wrote the lines so far."""
        if self._path is not None and self._path.exists():
            self.write({"event": NEW_RUN})

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one line, with the time; it is in the file when this returns."""
        path = self._path
        if path is None:
            return
        line = _line(row)

        def add() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                file.write(missing_line_end(path) + line)

        self._output.attempt(add)


def _line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON, with the time after its event."""
    event, *others = row.items()
    now = round(time.time(), 3)
    dated = dict([event, ("time", now), *others])
    plain = _plain(dated)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    """Return a value as JSON, its floats as ``metrics.jsonl`` has them."""
    if isinstance(value, Mapping):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return float_word(value)


def read_spikes(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run that still count; a line that cannot be read is left out."""
    rows: list[dict[str, Any]] = []
    try:
        data = (folder / SPIKES_FILE).read_bytes()
    except OSError:
        return rows
    for line in data.splitlines():
        row = _parsed(line)
        if row is None:
            continue
        if row["event"] == NEW_RUN:
            rows.clear()
        else:
            rows.append(row)
    return rows


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_event = isinstance(row, dict) and isinstance(row.get("event"), str)
    return row if is_event else None


def left_out_steps(rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """Return the steps whose packs are not trained on, by the decisions of these lines."""
    steps: set[int] = set()
    for row in rows:
        listed = row.get("left_out")
        if isinstance(listed, list):
            steps |= {step for step in listed if type(step) is int}
    return steps


def count_rollbacks(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return how often these lines decided to roll back."""
    return sum(row.get("action") == "rolled back" for row in rows)
