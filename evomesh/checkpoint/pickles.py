"""Read untrusted ``.pt`` files: tensors and plain containers only; nothing in them can run.

The files are read here and not by ``torch.load``, which hands a zip file that holds
``constants.pkl`` to TorchScript (whose code then runs) and unpacks an old tar file with
whatever links are in it. A file that names any class or function but those of
``pickle_names`` is refused, with the name. ``read_pickle`` reads all tensors, ``open_pickle`` leaves them
in the file.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch import Tensor

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.pickle_names import (
    ALLOWED,
    ARRAYS,
    STORAGES,
    ConfigStub,
    OpaqueStub,
)
from evomesh.checkpoint.stored_tensor import FileStorage

ZIP = b"PK\x03\x04"  # the first bytes of what torch has written since 1.6
# The first two pickles of what it wrote before.
MAGIC, PROTOCOL = (0x1950A86A20F9469CFC6C, 1001)
SCRIPT = ("constants.pkl", "code")  # what only TorchScript archives hold
READ_BYTES = 1 << 24  # bytes read at once
RATIO = 2  # unpacked bytes for each byte of the file; torch stores without compression
# Of the header before the bytes of a zip entry: its size, and where the lengths of the
# name and of the extra field stand, which follow it.
ENTRY_HEADER = 30
ENTRY_LENGTHS = slice(26, 30)


class _Unpickler(pickle.Unpickler):
    """Resolves names to the allowed ones only.

    Args:
        read_storage: called with key, dtype and count; returns a storage, read or not.
        inert: packages of whose classes stubs are made, never imported.
    """

    def __init__(
        self,
        file: IO[bytes],
        read_storage: Callable[[str, torch.dtype, int], Tensor | FileStorage]
        | None = None,
        inert: Collection[str] = (),
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._read_storage = read_storage
        self._inert = inert

    def find_class(self, module: str, name: str) -> Any:
        # ``builtins`` in protocol 2, which torch writes.
        if module == "__builtin__":
            module = "builtins"
        # The one gate: ``pickle`` asks here for every class and function before it calls
        # any. What is not returned below cannot run.
        allowed = ALLOWED.get((module, name))
        if allowed is not None:
            return allowed
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        if module == "torch":
            attribute = getattr(torch, name, None)
            if isinstance(attribute, torch.dtype):
                return attribute
        is_internevo = module.startswith(("internlm.", "internevo."))
        if is_internevo and name == "Config":
            return ConfigStub
        if (module, name) in ARRAYS or module.partition(".")[0] in self._inert:
            return OpaqueStub
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is neither a tensor nor a plain container"
        )

    def persistent_load(self, saved: Any) -> Tensor | FileStorage:
        kind, dtype, key, _, count, *view = saved
        if (
            self._read_storage is None
            or kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or any(view)
        ):
            raise pickle.UnpicklingError("its tensors are stored in an unknown way")
        return self._read_storage(str(key), dtype, int(count))


Allocation = tuple[Tensor, memoryview]  # a tensor and its bytes


def _allocate(dtype: torch.dtype, count: int, available: int) -> Allocation:
    """Return an empty tensor and its bytes.

    Args:
        available: bytes that the file can hold for it.
    """
    # The count is the pickle's word: without the limit a small file could ask for any
    # amount of memory.
    size = count * dtype.itemsize
    if not 0 <= size <= available:
        raise pickle.UnpicklingError(
            f"a tensor in it takes {size} bytes, the file has {available}"
        )
    buffer = bytearray(size)
    tensor = (
        torch.frombuffer(buffer, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    )
    return tensor, memoryview(buffer)


def _fill(file: IO[bytes], buffer: memoryview) -> None:
    """Read the bytes of one tensor."""
    filled = 0
    while filled < len(buffer):
        missing = len(buffer) - filled
        part = file.read(min(missing, READ_BYTES))
        if not part:
            raise EOFError("it ends within a tensor")
        end = filled + len(part)
        buffer[filled:end] = part
        filled = end


def _read_zip(path: str) -> Any:
    """Read the format of torch since 1.6.

    It is a zip file with ``data.pkl`` and one entry for each storage.
    """
    #     model_tp0_pp0/data.pkl       the containers; a tensor names its storage by key
    #     model_tp0_pp0/byteorder      "little"; absent in files of older versions
    #     model_tp0_pp0/data/0         the bytes of storage 0
    #     model_tp0_pp0/data/1
    with zipfile.ZipFile(path) as archive:
        entries = _checked_entries(path, archive)
        storages: dict[str, Tensor] = {}

        def read_storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if key in storages:
                return storages[key]
            entry = entries[f"data/{key}"]
            tensor, buffer = _allocate(dtype, count, entry.file_size)
            with archive.open(entry) as file:
                _fill(file, buffer)
            storages[key] = tensor
            return tensor

        with archive.open(entries["data.pkl"]) as file:
            unpickler = _Unpickler(file, read_storage)
            return unpickler.load()


def _open_zip(path: str, inert: Collection[str]) -> Any:
    """Read ``data.pkl`` of such a file alone; its tensors are ``StoredTensor``."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        entries = _checked_entries(path, archive)
        storages: dict[str, FileStorage] = {}

        def find_storage(key: str, dtype: torch.dtype, count: int) -> FileStorage:
            # Several tensors may share a storage.
            if key in storages:
                return storages[key]
            name = f"data/{key}"
            entry = entries[name]
            size = count * dtype.itemsize
            start = _position(raw, entry, size)
            checksum = entry.CRC
            storage = FileStorage(path, start, dtype, count, checksum)
            storages[key] = storage
            return storage

        content = entries["data.pkl"]
        with archive.open(content) as file:
            unpickler = _Unpickler(file, find_storage, inert)
            return unpickler.load()


def _position(raw: IO[bytes], entry: zipfile.ZipInfo, size: int) -> int:
    """Return where the bytes of an entry start in the file.

    There must be ``size`` of them, not compressed.
    """
    # An entry has a second header before its bytes, with fields of any length: the
    # archive's table gives the header's place only.
    start = entry.header_offset
    raw.seek(start)
    header = raw.read(ENTRY_HEADER)
    if not header.startswith(ZIP) or len(header) < ENTRY_HEADER:
        raise EOFError(f"{entry.filename} is not where the file's table has it")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
        raise pickle.UnpicklingError(
            f"a tensor in it takes {size} bytes, the file has {entry.file_size} for it"
        )
    lengths = struct.unpack("<HH", header[ENTRY_LENGTHS])
    name_length, extra_length = map(int, lengths)
    return start + ENTRY_HEADER + name_length + extra_length


def _checked_entries(path: str, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by their names in the archive's folder.

    The archive must be one of ``torch.save``.
    """
    _check_entries(path, archive)
    names = sorted(set(archive.namelist()))
    root = _root_folder(path, names)
    entries = {}
    for entry in archive.infolist():
        name = entry.filename.removeprefix(root)
        entries[name] = entry
    order = "little"
    if "byteorder" in entries:  # absent in files of older versions
        content = archive.read(f"{root}byteorder")
        order = content.decode()
    _check_byte_order(path, order)
    return entries


def _check_entries(path: str, archive: zipfile.ZipFile) -> None:
    """Refuse archives that unpack to far more than their size, and programs."""
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > RATIO * os.path.getsize(path) + (1 << 20):
        raise _refusal("unpacks to more than twice its size: refused", path)
    inner_names = set()
    for name in archive.namelist():
        _, *parts = name.split("/")
        inner_names.update(parts)
    if not inner_names.isdisjoint(SCRIPT):
        raise CheckpointError(
            "is a TorchScript archive, which is a program: refused",
            where=path,
            expected="a file of torch.save",
            code="EVO-CKPT-017",
        )


def _root_folder(path: str, names: list[str]) -> str:
    """Return the one folder of the archive, with a slash at the end."""
    roots = [
        name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise CheckpointError(
            "is not a file of torch.save",
            where=path,
            expected="one data.pkl in one folder",
            code="EVO-CKPT-017",
        )
    return roots[0]


def _refusal(found: str, path: str) -> CheckpointError:
    return CheckpointError(found, where=path, code="EVO-CKPT-017")


def _check_byte_order(path: str, order: str) -> None:
    if order != sys.byteorder:
        raise _refusal("was written on a machine of another byte order", path)


def _read_old(path: str, file: IO[bytes]) -> Any:
    """Read the format of torch before 1.6.

    It is pickles one after another, then the bytes of the storages:

        magic number, protocol, {"little_endian": True, ...}
        the content, whose tensors name their storages by key
        the keys, in the order of what follows
        of each storage: number of its elements (8 bytes), its bytes
    """

    def next_pickle() -> Any:
        return _Unpickler(file).load()

    # 1. The head.
    if next_pickle() != MAGIC or next_pickle() != PROTOCOL:
        raise _refusal("is not a file of torch.save", path)
    system = next_pickle()
    order = "little" if system["little_endian"] else "big"
    _check_byte_order(path, order)

    # 2. The content. Its tensors are empty until the bytes that follow it are read into
    #    their storages.
    storages: dict[str, Allocation] = {}
    available = os.path.getsize(path)

    def allocate_storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        nonlocal available
        if key not in storages:
            tensor, buffer = _allocate(dtype, count, available)
            available -= len(buffer)
            storages[key] = (tensor, buffer)
        tensor, _ = storages[key]
        return tensor

    content = _Unpickler(file, allocate_storage).load()

    # 3. The bytes of the storages.
    for key in next_pickle():
        tensor, buffer = storages[str(key)]
        count = int.from_bytes(file.read(8), sys.byteorder)
        if count != tensor.numel():
            raise EOFError("the size of a tensor in it contradicts its header")
        _fill(file, buffer)
    return content


@contextmanager
def _refusing_damage(path: str) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into one error."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path, code="EVO-CKPT-004") from None
    except Exception as error:
        # A damaged file can make the reader raise nearly anything.
        raise CheckpointError(
            f"cannot be read: {error}",
            where=path,
            expected="tensors in plain containers",
            code="EVO-CKPT-017",
        ) from None


def read_pickle(path: str) -> Any:
    """Read a ``.pt`` file, tensors on the CPU.

    Raises:
        CheckpointError: unreadable, not of torch, a program, unpacks to far more than its size, or names something
            not allowed.
    """
    with _refusing_damage(path), open(path, "rb") as file:
        if file.read(len(ZIP)) == ZIP:
            return _read_zip(path)
        file.seek(0)
        return _read_old(path, file)


def open_pickle(path: str, inert: Collection[str] = ()) -> Any:
    """Read what a ``.pt`` file holds beside its tensors, which are returned as ``StoredTensor``.

    Args:
        inert: packages whose objects are replaced with empty ones; neither package nor object is loaded.

    Raises:
        CheckpointError: as ``read_pickle``, and for files of torch before 1.6.
    """
    with _refusing_damage(path):
        return _open_zip(path, inert)
