"""Part files: a large file grows under a hidden name, ``.NAME.HOST.RANDOM.part``, until it is complete.

A running writer holds a lock on its part, which the kernel releases when the process
ends for whatever reason. So an unlocked part was left by a killed run. Not every shared
file system passes locks between machines: a part of another host counts as dead only
if, in addition, nothing was written to it for a day.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from evomesh.errors import UserError
from evomesh.outside_errors import fix_for

logger = logging.getLogger(__name__)

DEAD_SECONDS = 24 * 3600.0
# Suffixes of the files that a writer puts beside its part.
COMPANIONS = (".meta", ".json")

LockState = Literal["taken", "held", "unsupported"]


def open_part(path: Path) -> tuple[Path, IO[bytes]]:
    """Create a new part beside ``path``, open for writing and locked until it is closed.

    Raises:
        UserError: the folder cannot be written to.
    """
    while True:
        part = path.with_name(f".{path.name}.{_host()}.{secrets.token_hex(4)}.part")
        try:
            file = part.open("xb")
        except OSError as error:
            raise UserError(
                f"cannot write there: {error.strerror}",
                where=str(path),
                fix=fix_for(error.errno) or "write to another folder",
                code="EVO-DATA-026",
            ) from None
        # Another run may have taken it for a dead part, and removed it, before it was
        # locked.
        _lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:
            return part, file
        file.close()


def remove_dead_parts(path: Path) -> None:
    """Remove the parts of ``path`` that killed runs left, and log each."""
    name = re.escape(path.name)
    pattern = re.compile(
        rf"(\.{name}\.([A-Za-z0-9-]+)\.[0-9a-f]{{8}}\.part)(\.meta|\.json)?"
    )
    matches = map(pattern.fullmatch, os.listdir(path.parent))
    parts = {match.group(1, 2) for match in matches if match}  # name of the part, host
    for part_name, host in sorted(parts):
        part = path.with_name(part_name)
        try:
            size = _remove_if_dead(part, path, host)
        except OSError:  # another run removed it, or it belongs to another user
            continue
        if size is not None:
            logger.warning(
                "removed %s (%s bytes), left by a run that was killed",
                part,
                f"{size:,}",
            )


def _remove_if_dead(part: Path, path: Path, host: str) -> int | None:
    """Remove a dead part with its companions; return their bytes, None when it may still be written."""
    # A run that was killed between two renames left companions of a part that already
    # has its final name.
    with (part if part.exists() else path).open("r+b") as file:
        lock = _lock(file, wait=False)
        if lock == "held":
            return None
        lock_is_proof = lock == "taken" and host == _host()
        idle = time.time() - os.fstat(file.fileno()).st_mtime
        if not lock_is_proof and idle < DEAD_SECONDS:
            return None
        size = 0
        for suffix in ("", *COMPANIONS):
            leftover = Path(f"{part}{suffix}")
            if leftover.exists():
                size += leftover.stat().st_size
                leftover.unlink(missing_ok=True)
    return size


def _lock(file: IO[bytes], *, wait: bool) -> LockState:
    """Lock a file; return "held" when another process has it, "unsupported" when the file system has no locks."""
    mode = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(file, mode)
    except OSError as error:
        return "held" if error.errno in (errno.EACCES, errno.EAGAIN) else "unsupported"
    return "taken"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


@contextmanager
def report_disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the disk into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write: {error.strerror}",
            where=str(path),
            fix=fix_for(error.errno) or "free space there, or write elsewhere",
            code="EVO-DATA-026",
        ) from None
