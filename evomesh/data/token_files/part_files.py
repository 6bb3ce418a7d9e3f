"""Files that are written under a hidden name, ``.NAME.HOST.RANDOM.part``, until they are whole.

A living writer holds a lock on its part, which the kernel drops when the process ends, however it ends: so what nobody
holds was left by a killed run. Not every shared file system carries locks from one machine to another: the part of
another host is taken for dead only when besides nothing was written to it for a day.
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
from pathlib import Path
from typing import IO

from evomesh.errors import UserError

logger = logging.getLogger(__name__)

DEAD_SECONDS = 24 * 3600.0
MORE = (".meta", ".json")  # what a writer puts beside its part under the same name


def open_part(path: Path) -> tuple[Path, IO[bytes]]:
    """A new part beside ``path``, open for writing and held until it is closed.

    Raises:
        UserError: the folder cannot be written to.
    """
    while True:
        part = path.with_name(f".{path.name}.{_host()}.{secrets.token_hex(4)}.part")
        try:
            file = part.open("xb")
        except OSError as error:
            raise UserError(f"cannot write there: {error.strerror}", where=str(path)) from None
        _hold(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:  # else another run took it for a dead one before it was held
            return part, file
        file.close()


def remove_dead_parts(path: Path) -> None:
    """Remove the parts of ``path`` that killed runs left, and say so."""
    form = re.compile(rf"(\.{re.escape(path.name)}\.([A-Za-z0-9-]+)\.[0-9a-f]{{8}}\.part)(\.meta|\.json)?")
    found = {match.groups()[:2] for name in os.listdir(path.parent) if (match := form.fullmatch(name))}
    for name, host in sorted(found):
        part = path.with_name(name)
        try:
            # A run that is killed while it renames leaves what lies beside a part that has its final name already.
            with (part if part.exists() else path).open("r+b") as raw:
                held = _hold(raw, wait=False)
                idle = time.time() - os.fstat(raw.fileno()).st_mtime
                if held is False or ((held is None or host != _host()) and idle < DEAD_SECONDS):
                    continue
                left = [file for suffix in ("", *MORE) if (file := Path(f"{part}{suffix}")).exists()]
                size = sum(file.stat().st_size for file in left)
                for file in left:
                    file.unlink(missing_ok=True)
        except OSError:  # gone meanwhile, or another user's
            continue
        logger.warning("removed %s (%s bytes), left by a run that was killed", part, f"{size:,}")


def _hold(file: IO[bytes], *, wait: bool) -> bool | None:
    """Lock a file: False when another process holds it, None when the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
