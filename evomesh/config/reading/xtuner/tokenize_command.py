"""The parts of an ``evomesh tokenize`` command line that a translated config carries.

Apart from ``raw_data``, which writes it, since every start of the command line imports this.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def output_of(command: Sequence[str]) -> Path:
    """Return the token file that an ``evomesh tokenize`` command line writes."""
    return Path(command[command.index("--output") + 1])


def sources_of(command: Sequence[str]) -> list[str]:
    """Return the files and folders that an ``evomesh tokenize`` command line reads."""
    return list(command[1 : command.index("--output")])
