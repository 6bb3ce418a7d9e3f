"""Read untrusted ``.pt`` files: tensors and plain containers only; nothing in them can run.

The files are read here and not by ``torch.load``, which hands a zip file that holds
``constants.pkl`` to TorchScript (whose code then runs) and unpacks an old tar file with
whatever links are in it. A file that names any class or function but those below is
refused, with the name.
"""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import IO, Any

import torch
from torch import Tensor

from evomesh.checkpoint.native.format import CheckpointError

ARRAYS = {
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
ZIP = b"PK\x03\x04"  # the first bytes of what torch has written since 1.6
# The first two pickles of what it wrote before.
MAGIC, PROTOCOL = (0x1950A86A20F9469CFC6C, 1001)
SCRIPT = ("constants.pkl", "code")  # what only TorchScript archives hold
READ_BYTES = 1 << 24  # bytes read at once
RATIO = 2  # unpacked bytes for each byte of the file; torch stores without compression


class ConfigStub(dict[str, Any]):
    """Stands for the ``Config`` class of InternEvo's package, which is a dict."""

    def __setstate__(self, state: Any) -> None:
        return


class OpaqueStub:
    """Stands for NumPy's arrays (the state of a random generator, say); their content is dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return


class _Call:
    """A function that a pickle may call and cannot change.

    Pickles can set attributes of what they name.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _tensor(
    flat: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any
) -> Tensor:
    """Return a view of a storage.

    ``rest``: whether it needs gradients and its hooks, which are ignored, and flags,
    which no checkpoint sets.
    """
    if not isinstance(flat, Tensor) or any(rest[2:]):
        raise pickle.UnpicklingError("a tensor in it is of an unknown kind")
    # Refuses what is outside of ``flat``.
    return torch.as_strided(flat, size, stride, offset)


def _bytes(text: str, coding: str) -> bytes:
    """Undo how protocol 2 writes bytes."""
    if not isinstance(text, str) or coding != "latin1":
        raise pickle.UnpicklingError("it encodes text in an unknown way")
    return text.encode(coding)


def _parameter(data: Tensor, *rest: Any) -> Tensor:
    return data


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "dict"): dict,
    ("builtins", "slice"): slice,
    ("_codecs", "encode"): _Call(_bytes),
}


class _Unpickler(pickle.Unpickler):
    """Resolves names to the allowed ones only.

    ``read_storage(key, dtype, count)`` returns a storage as a tensor.
    """

    def __init__(
        self,
        file: IO[bytes],
        read_storage: Callable[[str, torch.dtype, int], Tensor] | None = None,
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._read_storage = read_storage

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
        if (module, name) in ARRAYS:
            return OpaqueStub
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is neither a tensor nor a plain container"
        )

    def persistent_load(self, saved: Any) -> Tensor:
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
        _check_entries(path, archive)
        entries = {entry.filename: entry for entry in archive.infolist()}
        root = _root_folder(path, list(entries))
        order_entry = f"{root}byteorder"
        order = "little"
        if order_entry in entries:
            order = archive.read(order_entry).decode()
        _check_byte_order(path, order)
        storages: dict[str, Tensor] = {}

        def read_storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if key not in storages:
                name = f"{root}data/{key}"
                entry = entries[name]
                tensor, buffer = _allocate(dtype, count, entry.file_size)
                with archive.open(entry) as file:
                    _fill(file, buffer)
                storages[key] = tensor
            return storages[key]

        with archive.open(entries[f"{root}data.pkl"]) as file:
            unpickler = _Unpickler(file, read_storage)
            return unpickler.load()


def _check_entries(path: str, archive: zipfile.ZipFile) -> None:
    """Refuse archives that unpack to far more than their size, and programs."""
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > RATIO * os.path.getsize(path) + (1 << 20):
        raise CheckpointError(
            "unpacks to more than twice its size: refused", where=path
        )
    inner_names = set()
    for name in archive.namelist():
        _, *parts = name.split("/")
        inner_names.update(parts)
    if not inner_names.isdisjoint(SCRIPT):
        raise CheckpointError(
            "is a TorchScript archive, which is a program: refused",
            where=path,
            expected="a file of torch.save",
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
        )
    return roots[0]


def _check_byte_order(path: str, order: str) -> None:
    if order != sys.byteorder:
        raise CheckpointError(
            "was written on a machine of another byte order", where=path
        )


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
        raise CheckpointError("is not a file of torch.save", where=path)
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


def read_pickle(path: str) -> Any:
    """Read a ``.pt`` file, tensors on the CPU.

    Raises:
        CheckpointError: unreadable, not of torch, a program, unpacks to far more than its
            size, or names something not allowed.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(ZIP)) == ZIP:
                return _read_zip(path)
            file.seek(0)
            return _read_old(path, file)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path) from None
    except Exception as error:
        # A damaged file can make the reader raise nearly anything.
        raise CheckpointError(
            f"cannot be read: {error}",
            where=path,
            expected="tensors in plain containers",
        ) from None
