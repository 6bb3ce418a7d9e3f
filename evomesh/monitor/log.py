"""The run's log: one line format on the terminal and in the run folder.

Secrets are redacted in both.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import IO

from rich.console import Console

from evomesh.config.redact import redact_text
from evomesh.errors import printable
from evomesh.outside_errors import discard

LINE = (
    "%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s in %(funcName)s -- %(message)s"
)
# Logger.info(message, extra=ALL_RANKS): shown on the terminal by every rank.
ALL_RANKS = {"all_ranks": True}
_ROOT = logging.getLogger("evomesh")


def setup_logging(
    folder: Path | None = None,
    rank_name: str = "main",
    shows: bool = True,
    console: Console | None = None,
) -> Console:
    """Send the ``evomesh`` loggers to the terminal and, given a folder, to a file in it.

    A second call replaces the handlers of the first: a run logs to the terminal until
    its folder is known.

    Args:
        folder: of the run; its file is ``logs/RANK_NAME.log``.
        rank_name: for example ``dp=0_tp=0_pp=0``.
        shows: whether this rank's lines appear on the terminal; otherwise only warnings
            and ``ALL_RANKS`` lines do.
        console: shared with ``ProgressLine``, so that log lines are printed above the
            live line.
    """
    console = console or Console(file=sys.stdout)

    def is_shown(record: logging.LogRecord) -> bool:
        is_warning = record.levelno >= logging.WARNING
        return shows or is_warning or hasattr(record, "all_ranks")

    terminal: logging.Handler = TerminalHandler(console.file)
    if console.is_terminal:
        terminal = ConsoleHandler(console)
    terminal.addFilter(is_shown)
    handlers = [terminal]
    if folder is not None:
        path = folder / "logs" / f"{rank_name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(LogFileHandler(path))
    # The handlers of an earlier call go only now: if the new file cannot be opened,
    # they are still there.
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
        with contextlib.suppress(OSError):  # a full disk has been reported
            handler.close()
    _ROOT.propagate = True


class TerminalHandler(logging.StreamHandler[IO[str]]):
    """Handler of a pipe or file.

    It is silent once the reader has gone (``| head``) or the disk is full.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        # ``logging`` would print a traceback to stderr for each line that is lost.
        if isinstance(sys.exc_info()[1], OSError):
            discard(self.stream)
        else:
            super().handleError(record)


class ConsoleHandler(logging.Handler):
    """Handler that prints through rich, which keeps a live progress line below what is printed."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        # The line as it is: ``[/rank0]`` in a path is not markup, and a line that rich
        # had wrapped could not be copied whole.
        line = self.format(record)
        try:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        except (OSError, SystemExit):  # rich exits where the reader of a pipe has gone
            discard(self._console.file)
        except Exception:
            self.handleError(record)


class LogFileHandler(logging.FileHandler):
    """Handler of the log file in the run folder.

    A full disk is reported once, by the other handlers.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            _ROOT.warning(
                "cannot write the log file %s (%s); lines will be missing",
                self.baseFilename,
                error,
            )


class SecretFreeFormatter(logging.Formatter):
    """Formatter that redacts secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact_text(super().format(record)))
