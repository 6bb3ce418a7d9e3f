"""A tracker that writes plain JSON lines: for own scripts, and an example of an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomesh.config.json_codec import float_word
from evomesh.config.user import expand_home
from evomesh.monitor.trackers.tracker import TrackedRun


class JsonLinesTracker:
    """One JSON object per call: ``{"event": "scalars", "step": 3, "values": {...}}``.

    Args:
        path: of the file; by default ``tracker.jsonl`` in the run folder.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path = None if path is None else expand_home(path)

    def start(self, run: TrackedRun) -> str:
        self._path = self._path or run.folder / "tracker.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        event = "start" if run.run_id is None else "resume"
        self._write(event, name=run.name, step=run.step, config=dict(run.config))
        return run.run_id or run.name

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        figures = {name: float_word(value) for name, value in values.items()}
        self._write("scalars", step=step, values=figures)

    def text(self, name: str, value: str) -> None:
        self._write("text", name=name, value=value)

    def file(self, path: Path) -> None:
        self._write("file", path=str(path))

    def finish(self, complete: bool) -> None:
        self._write("finish", complete=complete)

    def _write(self, event: str, **values: Any) -> None:
        assert self._path is not None
        line = json.dumps({"event": event, **values}, ensure_ascii=False, default=str)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
