"""The protocol of trackers, which adapters and custom classes follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """Facts of a run that a tracker gets when it starts.

    Attributes:
        name: of the run.
        folder: of the run.
        config: its values by dotted key, without secrets.
        run_id: what ``start`` returned when the run was new; None for a new run.
        step: the next step; a resumed run repeats steps from here on.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    run_id: str | None
    step: int


class Tracker(Protocol):
    """Receives the figures of a run, from one thread at a time.

    It may raise anything: the run then continues without it.
    """

    def start(self, run: TrackedRun) -> str:
        """Begin the run, or continue the one of ``run.run_id``; return its id."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, name: str, value: str) -> None: ...
    def file(self, path: Path) -> None: ...
    def finish(self, complete: bool) -> None:
        """Send what is left; ``complete``: all steps are done."""
        ...
