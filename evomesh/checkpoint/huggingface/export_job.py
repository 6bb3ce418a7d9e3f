"""Messages between a run and the process that exports its checkpoints."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

END_S = 3.0  # how long an export that is given up has to delete what it wrote


@dataclass(frozen=True)
class ExportJob:
    """One checkpoint to export.

    Attributes:
        checkpoint: the step folder, local or in a store.
        step, attempt: of the checkpoint.
        out: the folder to write, on a local disk.
        run: see ``ExportMark``.
        dtype: None: as trained.
    """

    checkpoint: str
    step: int
    attempt: str
    out: str
    run: str
    dtype: str | None = None

    @property
    def command(self) -> str:
        """The command that does the same by hand."""
        words = ["evomesh", "convert", "to-hf", self.checkpoint, self.out]
        if self.dtype is not None:
            words += ["--dtype", self.dtype]
        return shlex.join(words)


@dataclass(frozen=True)
class ExportResult:
    """The outcome of an export.

    Attributes:
        lines: what it reported.
        error: why there is no folder; "" for success.
    """

    lines: tuple[str, ...] = ()
    error: str = ""
