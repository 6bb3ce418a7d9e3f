"""The warnings of a config as a user reads them: a few in full, many as one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

IN_FULL = 3  # more warnings than this are one line
KEY = re.compile(r"^[\w.]+")  # which a warning begins with
SYNTHETIC = "SYNTHETIC data"  # in warnings that a loss is not of the user's text


def warning_lines(warnings: Sequence[str], path: str) -> list[str]:
    """Return one line for each warning, or for many a single one with their keys and where their reasons are.

    A config that was copied from a guide sets many keys to what happens anyway, and
    eight long lines hide the one that matters. A warning of no key, such as one of a
    command-line option, always has a line, and so has one of synthetic data.
    """
    if len(warnings) <= IN_FULL:
        return list(warnings)
    lines = []
    keys: dict[str, None] = {}
    for words in warnings:
        key = KEY.match(words)
        if key is None or SYNTHETIC in words:
            lines.append(words)
        else:
            keys[key[0]] = None
    if keys:
        lines.append(
            f"{len(keys)} settings have no effect or need attention: {', '.join(keys)}; "
            f"why: evomesh config check {path or 'CONFIG'} -v"
        )
    return lines
