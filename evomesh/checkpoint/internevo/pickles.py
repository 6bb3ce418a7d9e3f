"""Opens other people's ``.pt`` files: tensors and plain containers only, nothing in them can run.

The files are read here and not by ``torch.load``, which hands a zip file that holds ``constants.pkl`` to TorchScript
(whose code then runs) and unpacks an old tar file with whatever links are in it. A file that names any class or
function but those below is refused, with the name.
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
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of what it wrote before
SCRIPT = ("constants.pkl", "code")  # what only TorchScript archives hold
RATIO = 2  # unpacked bytes for each byte of the file; torch stores without compression


class ConfigStub(dict[str, Any]):
    """Stands for the ``Config`` class of InternEvo's package, which is a dict."""

    def __setstate__(self, state: Any) -> None:
        return


class OpaqueStub:
    """Stands for NumPy's arrays (the state of a random generator, say): what they hold is thrown away."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return


class _Call:
    """A function that a pickle may call and cannot change: pickles can set attributes of what they name."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _tensor(flat: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> Tensor:
    """``rest``: whether it needs gradients and its hooks, which do not count here, and flags, which nobody sets."""
    if not isinstance(flat, Tensor) or any(rest[2:]):
        raise pickle.UnpicklingError("a tensor in it is of no known kind")
    return torch.as_strided(flat, size, stride, offset)  # refuses what is outside of ``flat``


def _bytes(text: str, coding: str) -> bytes:
    """Undo how protocol 2 writes bytes."""
    if not isinstance(text, str) or coding != "latin1":
        raise pickle.UnpicklingError("it encodes text in no known way")
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
    """``flat``: gives the tensor of one storage, by its key."""

    def __init__(
        self, file: IO[bytes], flat: Callable[[str, torch.dtype, int], Tensor] | None = None
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._flat = flat

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # its name in protocol 2
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith(("internlm.", "internevo.")) and name == "Config":
            return ConfigStub
        if (module, name) in ARRAYS:
            return OpaqueStub
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is neither a tensor nor a plain container"
        )

    def persistent_load(self, saved: Any) -> Tensor:
        kind, dtype, key, _, count, *view = saved
        if self._flat is None or kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
            raise pickle.UnpicklingError("its tensors are stored in no known way")
        return self._flat(str(key), dtype, int(count))


def _empty(dtype: torch.dtype, count: int, room: int) -> tuple[Tensor, memoryview]:
    """A tensor and its bytes, of which a file has at most ``room``."""
    size = count * dtype.itemsize
    if not 0 <= size <= room:
        raise pickle.UnpicklingError(f"a tensor in it takes {size} bytes, the file has {room}")
    held = bytearray(size)
    return torch.frombuffer(held, dtype=dtype) if size else torch.empty(0, dtype=dtype), memoryview(held)


def _fill(file: IO[bytes], held: memoryview) -> None:
    done = 0
    while done < len(held):
        part = file.read(min(len(held) - done, 1 << 24))
        if not part:
            raise EOFError("it ends within a tensor")
        held[done : done + len(part)] = part
        done += len(part)


def _read_zip(path: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if sum(entry.file_size for entry in archive.infolist()) > RATIO * os.path.getsize(path) + (1 << 20):
            raise CheckpointError("unpacks to more than twice its size: refused", where=path)
        if any(part in SCRIPT for name in entries for part in name.split("/")[1:]):
            raise CheckpointError(
                "is a TorchScript archive, which is a program: refused",
                where=path,
                expected="a file of torch.save",
            )
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError(
                "is not a file of torch.save", where=path, expected="one data.pkl in one folder"
            )
        root, found = roots[0], dict[str, Tensor]()
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in entries else "little"
        if order != sys.byteorder:
            raise CheckpointError("was written on a machine of another byte order", where=path)

        def flat(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if key not in found:
                entry = entries[f"{root}data/{key}"]
                found[key], held = _empty(dtype, count, entry.file_size)
                with archive.open(entry) as file:
                    _fill(file, held)
            return found[key]

        with archive.open(entries[f"{root}data.pkl"]) as file:
            return _Unpickler(file, flat).load()


def _read_old(path: str, file: IO[bytes]) -> Any:
    """Read the format of torch before 1.6: pickles one after another, then the bytes of the storages."""
    if _Unpickler(file).load() != MAGIC or _Unpickler(file).load() != PROTOCOL:
        raise CheckpointError("is not a file of torch.save", where=path)
    little = _Unpickler(file).load()["little_endian"]
    if little != (sys.byteorder == "little"):
        raise CheckpointError("was written on a machine of another byte order", where=path)
    found: dict[str, tuple[Tensor, memoryview]] = {}
    room = os.path.getsize(path)

    def flat(key: str, dtype: torch.dtype, count: int) -> Tensor:
        nonlocal room
        if key not in found:
            found[key] = _empty(dtype, count, room)
            room -= len(found[key][1])
        return found[key][0]

    content = _Unpickler(file, flat).load()
    for key in _Unpickler(file).load():
        tensor, held = found[str(key)]
        if int.from_bytes(file.read(8), sys.byteorder) != tensor.numel():
            raise EOFError("a tensor in it has another size than it says")
        _fill(file, held)
    return content


def read_pickle(path: str) -> Any:
    """The content of a ``.pt`` file, tensors on the CPU.

    Raises:
        CheckpointError: unreadable, not of torch, a program, unpacks to far more than its size, or names something
            not allowed.
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
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise CheckpointError(
            f"cannot be read: {error}", where=path, expected="tensors in plain containers"
        ) from None
