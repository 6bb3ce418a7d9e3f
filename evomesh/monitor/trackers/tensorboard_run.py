"""TensorBoard as a tracker: event files in a folder of choice, beside those that ``enable_tb`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evomesh.config.user import expand_home
from evomesh.monitor.tensorboard import TensorBoardWriter
from evomesh.monitor.trackers.tracker import TrackedRun


class TensorBoardTracker:
    """Writes scalars and texts as event files.

    Args:
        folder: of the files; by default ``tracker_tensorboard`` in the run folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = None if folder is None else expand_home(folder)
        self._board: TensorBoardWriter | None = None

    def start(self, run: TrackedRun) -> str:
        folder = self._folder or run.folder / "tracker_tensorboard"
        self._board = TensorBoardWriter(folder, run.step)
        return run.run_id or run.name

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.scalars(step, values)

    def text(self, name: str, value: str) -> None:
        self._writer.text(name, value)

    def file(self, path: Path) -> None:
        """Write the file's path: TensorBoard keeps no files."""
        self._writer.text("files", path)

    def finish(self, complete: bool) -> None:
        self._writer.close()

    @property
    def _writer(self) -> TensorBoardWriter:
        assert self._board is not None  # a tracker is started before it gets anything
        return self._board
