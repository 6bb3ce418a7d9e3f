"""Names that the pickle of a ``.pt`` file may have: tensors, plain containers and a few functions written here.

``pickles`` reads the files; each name that is not here is refused by it.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.stored_tensor import FileStorage, StoredTensor, check_view

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
PLAIN_TENSOR = (
    "torch.Tensor"  # stands for the class, of which a pickle needs the name only
)


class ConfigStub(dict[str, Any]):
    """Stands for the ``Config`` class of InternEvo's package, which is a dict."""

    def __setstate__(self, state: Any) -> None:
        return


class OpaqueStub:
    """Stands for objects whose content is dropped: NumPy's arrays (the state of a random generator, say)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return

    # What a pickle calls to fill containers.
    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def append(self, value: Any) -> None:
        return

    def extend(self, values: Any) -> None:
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
    flat: Tensor | FileStorage,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    *rest: Any,
) -> Tensor | StoredTensor:
    """Return a view of a storage.

    ``rest``: whether it needs gradients and its hooks, which are ignored, and flags,
    which no checkpoint sets.
    """
    flags = rest[2:]
    if not isinstance(flat, Tensor | FileStorage) or any(flags):
        raise pickle.UnpicklingError("a tensor in it is of an unknown kind")
    if isinstance(flat, FileStorage):
        check_view(flat.count, offset, size, stride)
        return StoredTensor(flat, offset, tuple(size), tuple(stride))
    check_view(flat.numel(), offset, size, stride)
    return torch.as_strided(flat, size, stride, offset)


def _bytes(text: str, coding: str) -> bytes:
    """Undo how protocol 2 writes bytes."""
    if not isinstance(text, str) or coding != "latin1":
        raise pickle.UnpicklingError("it encodes text in an unknown way")
    return text.encode(coding)


def _parameter(data: Tensor | StoredTensor, *rest: Any) -> Tensor | StoredTensor:
    return data


def _plain(
    rebuild: Any, kind: Any, arguments: Sequence[Any], attributes: Any
) -> Tensor | StoredTensor:
    """Return a tensor without the attributes that were set on it, as DeepSpeed sets them."""
    if not isinstance(rebuild, _Call) or kind != PLAIN_TENSOR:
        raise pickle.UnpicklingError("a tensor in it is of an unknown class")
    rebuilt = rebuild(*arguments)
    if not isinstance(rebuilt, Tensor | StoredTensor):
        raise pickle.UnpicklingError("a tensor in it is none")
    return rebuilt


def _enumerated(value: int) -> int:
    """Return the value of an enumeration's member."""
    if type(value) is not int:
        raise pickle.UnpicklingError("a number in it is none")
    return value


ZERO_STAGE = _Call(_enumerated)
# DeepSpeed's names of its stages.
ZERO_STAGES = {
    "disabled": 0,
    "optimizer_states": 1,
    "gradients": 2,
    "weights": 3,
    "max_stage": 3,
}


def _member(enumeration: Any, name: Any) -> int:
    """Return the value of a stage by its name: Python 3.11 wrote members so until 3.11.4, as a call of ``getattr``."""
    if enumeration is not ZERO_STAGE or not isinstance(name, str):
        raise pickle.UnpicklingError("it asks for an attribute of something else")
    if name not in ZERO_STAGES:
        raise pickle.UnpicklingError(f"it has a stage of ZeRO named {name!r}")
    return ZERO_STAGES[name]


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Call(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Call(_plain),
    ("torch", "Tensor"): PLAIN_TENSOR,
    ("torch.nn.parameter", "Parameter"): PLAIN_TENSOR,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "dict"): dict,
    ("builtins", "slice"): slice,
    ("_codecs", "encode"): _Call(_bytes),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): ZERO_STAGE,
    ("builtins", "getattr"): _Call(_member),
}
