"""Opens other people's ``.pt`` files: tensors and plain containers only, nothing in them can run.

A file that names any other class or function is refused, with the name.
"""

from __future__ import annotations

import pickle
import types
import zipfile
from typing import Any

import torch

from evomesh.checkpoint.native.format import CheckpointError

ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "dict"),
    ("builtins", "slice"),
    ("_codecs", "encode"),  # how protocol 2 writes bytes; it changes text to bytes and does nothing else
}
ARRAYS = {
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
RATIO = 2  # unpacked bytes for each byte of the file; torch stores without compression


class ConfigStub(dict[str, Any]):
    """Stands for the ``Config`` class of InternEvo's package, which is a dict."""


class OpaqueStub:
    """Stands for NumPy's arrays (the state of a random generator, say): what they hold is thrown away."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | types.EllipsisType):
            return getattr(torch, name)
        if module.startswith(("internlm.", "internevo.")) and name == "Config":
            return ConfigStub
        if (module, name) in ARRAYS:
            return OpaqueStub
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is neither a tensor nor a plain container"
        )


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def read_pickle(path: str) -> Any:
    """The content of a ``.pt`` file, tensors on the CPU.

    Raises:
        CheckpointError: unreadable, not of torch, unpacks to far more than its size, or names something not allowed.
    """
    restricted = types.ModuleType("restricted_pickle")
    restricted.Unpickler = _Unpickler  # type: ignore[attr-defined]
    restricted.load = _load  # type: ignore[attr-defined]
    restricted.UnpicklingError = pickle.UnpicklingError  # type: ignore[attr-defined]
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                if sum(e.file_size for e in entries) > RATIO * sum(e.compress_size for e in entries) + (
                    1 << 20
                ):
                    raise CheckpointError("unpacks to more than twice its size: refused", where=path)
        return torch.load(path, map_location="cpu", pickle_module=restricted, weights_only=False)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path) from None
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise CheckpointError(
            f"cannot be read: {error}", where=path, expected="tensors in plain containers"
        ) from None
