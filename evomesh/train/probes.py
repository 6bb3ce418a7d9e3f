"""Timed work of one rank: a matrix product, and files written to and read from a folder.

The times of collectives are in ``parallel/probes.py``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import dataclass

import torch

from evomesh.parallel.probes import best_seconds
from evomesh.storage.base import Storage, join

PRODUCT_SIZE = 512  # rows and columns: 0.3 GFLOP, milliseconds on one core
PROBE_FILE = ".evomesh-probe"  # start of the name of every file that a probe writes


def product_seconds(
    device: torch.device, size: int = PRODUCT_SIZE, repeats: int = 3
) -> float:
    """Return the seconds of a float32 product of two square matrices of ``size`` rows, the best of a few."""
    matrix = torch.ones(size, size, dtype=torch.float32, device=device)
    return best_seconds(lambda: torch.mm(matrix, matrix), device, repeats)


@dataclass(frozen=True)
class FileTimes:
    """Seconds that ``nbytes`` bytes took to a folder and back.

    Attributes:
        write: until the file was durable.
        read: not from the cache of this machine, where the system lets go of it.
    """

    nbytes: int
    write: float
    read: float

    @property
    def write_rate(self) -> float:
        """Return bytes per second."""
        return self.nbytes / self.write

    @property
    def read_rate(self) -> float:
        """Return bytes per second."""
        return self.nbytes / self.read


def time_folder(storage: Storage, folder: str, nbytes: int) -> FileTimes:
    """Write a file of ``nbytes`` bytes to ``folder``, make it durable, read it and delete it.

    Raises:
        OSError, StorageError: the folder cannot be written or read; the file is deleted all the same.
    """
    path = join(folder, f"{PROBE_FILE}-{secrets.token_hex(4)}")
    content = os.urandom(nbytes)  # neither compressed nor left out by a file system
    try:
        started = time.perf_counter()
        file = storage.create(path)
        file.write(content)
        file.finish()
        written = time.perf_counter()

        if not storage.remote:
            _drop_from_cache(path)
        begun = time.perf_counter()
        storage.read(path)
        ended = time.perf_counter()
    finally:
        with contextlib.suppress(OSError):
            storage.delete(path)
    return FileTimes(nbytes, written - started, ended - begun)


def _drop_from_cache(path: str) -> None:
    """Ask the system to forget a file's content, so that the next read is from the disk; it may refuse."""
    with contextlib.suppress(OSError, AttributeError):
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
