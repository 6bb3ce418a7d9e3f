"""Outputs that a run can do without: a full disk or a removed folder is logged once, and training continues."""

from __future__ import annotations

import logging
from collections.abc import Callable

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
                reason = f"{error.strerror or error}" + (
                    f": {error.filename}" if error.filename else ""
                )
                outcome = (
                    "some of it will be missing"
                    if self.tries_again
                    else "nothing more is written to it"
                )
                logger.warning(
                    "cannot write %s (%s); %s, and training continues",
                    self.name,
                    reason,
                    outcome,
                )
            self.has_failed = True
