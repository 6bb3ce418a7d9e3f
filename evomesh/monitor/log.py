"""The run's log: one line format on the terminal and in the run folder, with secrets redacted in both."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console

from evomesh.config.redact import redact_log
from evomesh.errors import printable

LINE = "%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s in %(funcName)s -- %(message)s"
ALL_RANKS = {"all_ranks": True}  # logger.info(message, extra=ALL_RANKS): shown on the terminal by every rank
_ROOT = logging.getLogger("evomesh")


def setup_logging(
    folder: Path | None = None, rank_name: str = "main", shows: bool = True, console: Console | None = None
) -> Console:
    """Send the ``evomesh`` loggers to the terminal and, given a ``folder``, to ``folder/logs/RANK_NAME.log``.

    A second call replaces the handlers of the first: a run logs to the terminal until its folder is known.

    Args:
        rank_name: for example ``dp=0_tp=0_pp=0``.
        shows: whether this rank's lines appear on the terminal; otherwise only warnings and ``ALL_RANKS`` lines do.
        console: shared with ``ProgressLine``, so that log lines are printed above the live line.
    """
    console = console or Console(file=sys.stdout)
    terminal: logging.Handler = (
        ConsoleHandler(console) if console.is_terminal else logging.StreamHandler(console.file)
    )
    terminal.addFilter(
        lambda record: shows or record.levelno >= logging.WARNING or hasattr(record, "all_ranks")
    )
    handlers = [terminal]
    if folder is not None:
        path = folder / "logs" / f"{rank_name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    close_logging()
    for handler in handlers:
        handler.setFormatter(SecretFreeFormatter(LINE))
        _ROOT.addHandler(handler)
    _ROOT.setLevel(logging.INFO)
    _ROOT.propagate = False
    return console


def close_logging() -> None:
    """Remove and close the handlers of ``setup_logging``."""
    for handler in list(_ROOT.handlers):
        _ROOT.removeHandler(handler)
        handler.close()
    _ROOT.propagate = True


class ConsoleHandler(logging.Handler):
    """Handler that prints through rich, which keeps a live progress line below what is printed."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


class SecretFreeFormatter(logging.Formatter):
    """Formatter that redacts secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact_log(super().format(record)))
