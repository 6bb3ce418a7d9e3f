"""The user this process runs as, also where the system knows neither a name nor a home folder for the number."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from evomesh.errors import UserError


def user_name() -> str:
    """Return the user's name; "number N" in a container that runs under a number without a passwd entry."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"number {os.geteuid()}"


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Return a path as the user typed it, with a leading ``~`` replaced by the home folder.

    Raises:
        UserError: this user, or the one that is named, has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            "'~' stands for a home folder, and this user has none",
            where=os.fspath(path),
            expected="the variable HOME, or a path without '~'",
            fix="export HOME=FOLDER, or write the path out",
            code="EVO-SYS-008",
        ) from None
