"""Outputs that a run can do without.

A full disk or a removed folder is logged once, and training continues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


class OptionalOutput:
    """Guard around the writes of one output, such as TensorBoard.

    Args:
        name: of the output, for the warning.
        tries_again: keep writing after a failure, because the disk may have room again.
    """

    def __init__(self, name: str, *, tries_again: bool) -> None:
        self.name = name
        self.tries_again = tries_again
        self.has_failed = False

    def attempt(self, write: Callable[[], object]) -> None:
        """Call ``write``; log its first ``OSError``, and no other."""
        if self.has_failed and not self.tries_again:
            return
        try:
            write()
        except OSError as error:
            if not self.has_failed:
                self._warn(error)
            self.has_failed = True

    def _warn(self, error: OSError) -> None:
        file = f": {error.filename}" if error.filename else ""
        outcome = "nothing more is written to it"
        if self.tries_again:
            outcome = "some of it will be missing"
        logger.warning(
            "cannot write %s (%s%s); %s, and training continues",
            self.name,
            error.strerror or error,
            file,
            outcome,
        )


def missing_line_end(path: Path) -> bytes:
    """Return what ends the last line of a file: a run that was killed may have left half a line."""
    with path.open("rb") as file:
        length = file.seek(0, 2)
        last = max(0, length - 1)
        file.seek(last)
        end = file.read()
    is_whole = end in (b"", b"\n")
    return b"" if is_whole else b"\n"
