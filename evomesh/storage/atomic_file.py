"""Write a local file whole: a reader sees the old file or the new one, never a half-written one.

Two places need more than this and keep their own way. A token file or a cache grows for
hours, so ``part_files.py`` locks its part, and the next run removes what a killed one
left. A checkpoint's commit record must never replace an existing one, so
``LocalStorage.publish`` links it into place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a hidden file beside ``path`` and rename it to ``path`` at the end of the block.

    The folder is created. After an error in the block ``path`` is as before and the
    hidden file is gone; a killed process leaves ``.NAME.PID.part``.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
