"""Create the folder of an output, and remove it again where nothing was written: a failed command leaves none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def create_folder(folder: Path) -> list[Path]:
    """Create a folder and those above it; return the ones that were not there, innermost first.

    Raises:
        OSError: it cannot be created.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_empty(created)
        raise
    return created


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, up to one that has something in it."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
