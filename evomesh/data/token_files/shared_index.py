"""``use_shm``: the processes of a node share one copy of the packing index.

Every array with an entry per document (their order, where each ends, which are long enough) is written once into
``shm_path``, under a name derived from what it depends on, and mapped by every process; so are the metas. The files of
a crashed run are used by the next run of the same data; a file that no run has used for a day is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from evomesh.data.token_files.mapping import map_array
from evomesh.errors import UserError
from evomesh.storage.atomic_file import write_atomically

SUFFIX = ".index.npy"
# The digest of what the index depends on, and what it holds.
INDEX_NAME = re.compile(r"[0-9a-f]{32}\.([0-9]+\.)?[a-z_]+\.index\.npy")
# A file that is being written, and the lock of who writes it.
HIDDEN_NAME = re.compile(rf"\.{INDEX_NAME.pattern}\.([0-9]+\.part|lock)")
STALE_SECONDS = 24 * 3600.0
DIGEST_ROWS = 1 << 20


def digest(arrays: Iterable[NDArray[np.integer]]) -> str:
    """Return a hash of arrays of lengths, in order: an index depends on nothing else."""
    state = xxhash.xxh3_128()
    for lengths in arrays:
        # The count keeps [1 2] [3] and [1] [2 3] apart.
        count = len(lengths)
        header = f"{count}:"
        state.update(header.encode())
        # A column of a meta is strided and may be int32: copy it, a part at a time.
        for start in range(0, count, DIGEST_ROWS):
            part = lengths[start : start + DIGEST_ROWS]
            contiguous = np.ascontiguousarray(part, np.int64)
            state.update(contiguous.data)
    return state.hexdigest()


def shared_array(
    folder: Path, key: str, build: Callable[[], NDArray[Any]]
) -> NDArray[Any]:
    """Map the array of ``key`` from ``folder``; build and write it first if it is not there.

    One process of a node builds it while the others wait: an order of 10^9 documents takes
    minutes and 12 GB, which eight at once would take eight times.

    Raises:
        UserError: the folder cannot be written, for instance because memory is full.
    """
    path = folder / f"{key}{SUFFIX}"
    if not path.exists():
        try:
            with _only_builder(path):
                if not path.exists():
                    with write_atomically(path) as file:
                        np.save(file, build())
        except OSError as error:
            raise UserError(
                f"cannot write the shared index: {error.strerror}",
                where=str(folder),
                fix="free space there, set data.shm_path to another folder, or data.use_shm=False",
                code="EVO-DATA-026",
            ) from None
    with suppress(OSError):  # mark it as used; another user's file cannot be marked
        os.utime(path)
    return map_array(path)


@contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Wait until no other process of this host builds the array of ``path``.

    The lock of a process that dies is released. Its file stays: removing it would let two
    processes hold locks of two files of one name.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("wb") as file:
        # Where the file system has no locks, two processes build the same bytes.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_stale(folder: Path) -> list[str]:
    """Remove indexes and partial files that no run has used for a day; return their names.

    The user chose the folder, and others may keep files in it: only names that
    ``shared_array`` gives are removed.
    """
    removed = []
    for path in sorted(folder.glob("*")):
        if not (INDEX_NAME.fullmatch(path.name) or HIDDEN_NAME.fullmatch(path.name)):
            continue
        with suppress(OSError):
            idle = time.time() - path.stat().st_mtime
            if idle > STALE_SECONDS:
                path.unlink()
                removed.append(path.name)
    return removed
