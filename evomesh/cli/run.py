"""Run a command: the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from evomesh.errors import UserError


def run(command: Callable[[], object]) -> None:
    """Call ``command``; print a ``UserError`` without a traceback and exit with its code."""
    try:
        command()
    except UserError as error:
        if os.environ.get("EVOMESH_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
