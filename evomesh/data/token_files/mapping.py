"""Map files for reading without keeping a handle: a data set may have more files than a process may have open.

Python's ``mmap`` and ``numpy.memmap`` keep a handle for as long as the map exists,
though the system needs none.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_MAP_FAILED = ctypes.c_void_p(-1).value


def map_file(path: Path) -> memoryview:
    """Return the bytes of a file, which are read from disk when they are used; unmapped with the last view of them.

    Raises:
        OSError: the file cannot be opened or mapped.
        ValueError: the file is empty.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        if not size:
            raise ValueError(f"{path} is empty")
        address = _map(handle, size)
    finally:
        os.close(handle)
    # The map belongs to this object: every view of it keeps it alive, and the system
    # takes the memory back when the last one is gone.
    content = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(
        content, _libc().munmap, ctypes.c_void_p(address), ctypes.c_size_t(size)
    )
    return memoryview(content).cast("B").toreadonly()


def map_array(path: Path) -> NDArray[Any]:
    """Return the array of a ``.npy`` file, mapped by ``map_file``.

    Raises:
        OSError: the file cannot be opened or mapped.
        ValueError: it is not a whole ``.npy`` file of plain numbers.
    """
    with path.open("rb") as file:
        shape, is_fortran, dtype = read_array_header(file)
        start = file.tell()
    # Objects are stored as a pickle, which can run any code when it is loaded.
    if dtype.hasobject:
        raise ValueError(f"{path} holds Python objects")
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, dtype)
    content = map_file(path)
    array = np.frombuffer(content, dtype, count, start)
    if is_fortran:
        return array.reshape(shape, order="F")
    return array.reshape(shape)


def read_array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an ``.npy`` file up to its content; return shape, whether in Fortran order, and dtype.

    Raises:
        ValueError: it is not such a file.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _map(handle: int, size: int) -> int:
    libc = _libc()
    # ctypes takes a result for an int of 32 bits, which would truncate an address.
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(
        None,
        ctypes.c_size_t(size),
        ctypes.c_int(mmap.PROT_READ),
        ctypes.c_int(mmap.MAP_SHARED),
        ctypes.c_int(handle),
        ctypes.c_longlong(0),
    )
    if address is None or address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(address)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
