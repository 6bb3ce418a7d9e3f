"""TensorBoard scalars and texts of one rank."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomesh.config.redact import redact_text


class TensorBoardWriter:
    """Scalars and texts of one rank.

    Args:
        folder: of this rank. A resumed run passes the one it had.
        step: next step; what an earlier run wrote for it and later ones is hidden.
        queue: number of steps that are buffered before a write.
        resume_from: folder of an earlier run whose curves are copied in first.
    """

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        queue: int = 10,
        resume_from: Path | None = None,
    ) -> None:
        # Imported here: it is slow to import, and many runs have TensorBoard switched
        # off.
        from torch.utils.tensorboard import SummaryWriter

        if resume_from is not None:
            is_other_folder = resume_from.resolve() != folder.resolve()
            if is_other_folder:
                shutil.copytree(resume_from, folder, dirs_exist_ok=True)
        # An event file cannot be shortened like ``metrics.jsonl``: with ``purge_step``
        # TensorBoard hides the points that a resumed run draws again. 0 would hide all.
        self._writer = SummaryWriter(str(folder), purge_step=step or None)
        self._queue = queue
        # (step, values) not yet written. SummaryWriter has a queue too, but it counts
        # values, not steps.
        self._buffered: list[tuple[int, dict[str, float]]] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._buffered.append((step, dict(values)))
        steps = {buffered_step for buffered_step, _ in self._buffered}
        if len(steps) >= self._queue:
            self.flush()

    def text(self, name: str, value: Any, step: int | None = None) -> None:
        """Write a text, for example the config, with its secrets redacted."""
        self._writer.add_text(name, redact_text(str(value)), step)

    def flush(self) -> None:
        for step, values in self._buffered:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        self._buffered.clear()
        self._writer.flush()

    def close(self) -> None:
        self.flush()
        self._writer.close()
