"""The live progress line below the log; without a terminal there is none."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class ProgressLine:
    """A live line with step, loss, speed and time left.

    Args:
        total: steps of the whole run.
        step: number of steps already done.
        console: the log's console; if it is None or not a terminal, ``update`` does nothing.
    """

    def __init__(self, total: int, step: int, console: Console | None) -> None:
        self._bar: RichProgress | None = None
        if console is not None and console.is_terminal:
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(
                "train",
                total=total,
                completed=step,
                figures="waiting for the first step",
            )

    def update(self, step: int, loss: float, speed: float) -> None:
        """Show that ``step`` steps are done; ``speed`` is in tokens per second."""
        if self._bar is not None:
            figures = f"loss {loss:.4f}  {speed:,.0f} tokens/s  left"
            self._bar.update(self._task, completed=step, figures=figures)

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
