"""Read one weight file.

It is safetensors in any storage, or a PyTorch pickle, none of whose code runs.
"""

from __future__ import annotations

import io
import json
import math
import operator
import os
import pickle
from collections.abc import Iterator
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import Box, Coordinates
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.write import as_bytes
from evomesh.storage.base import Storage

LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
MALFORMED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    EOFError,
    RecursionError,
)


class WeightFile(Protocol):
    """A file of named tensors.

    Attributes:
        shapes: those of all tensors, read from the header alone.
    """

    shapes: dict[str, Coordinates]

    def read(self, name: str, box: Box) -> Tensor:
        """Read a box of one tensor in its stored dtype."""
        ...


class SafetensorsFile:
    """A safetensors file, of which exactly the bytes of the requested boxes are read.

    Raises:
        CheckpointError: not a complete safetensors file.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage = storage
        self._path = path
        self.shapes: dict[str, Coordinates] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._starts: dict[str, int] = {}  # of each tensor's bytes in the file
        try:
            self._read_header()
        except MALFORMED as error:
            raise CheckpointError(
                f"not a complete safetensors file ({error})",
                where=path,
                code="EVO-HF-002",
            ) from None

    def _read_header(self) -> None:
        """Read the header.

        Its length (8 bytes) comes first, then JSON; offsets in it count from its end.
        """
        #     8 bytes  n, little-endian
        #     n bytes  {"lm_head.weight":{"dtype":"BF16","shape":[32000,4096],
        #               "data_offsets":[0,262144000]}, ...}
        storage = self._storage
        path = self._path
        file_size = storage.size(path)
        length_bytes = storage.read(path, 0, 8)
        length = int.from_bytes(length_bytes, "little")
        largest = min(file_size - 8, LARGEST_HEADER)
        if length > largest:
            raise ValueError(f"a header of {length} bytes in a file of {file_size}")
        text = storage.read(path, 8, length)
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        data_start = 8 + length
        data_size = file_size - data_start
        for name, entry in header.items():
            shape = tuple(int(size) for size in entry["shape"])
            dtype = fmt.DTYPES[entry["dtype"]]
            first, last = entry["data_offsets"]
            # The header is not trusted: the bytes are in the file, and as many as the
            # shape needs.
            expected_size = math.prod(shape) * dtype.itemsize
            size = last - first
            is_inside = first >= 0 and last <= data_size
            if not is_inside or size != expected_size:
                raise ValueError(f"{name}: bytes {first} to {last} of {data_size}")
            self.shapes[name] = shape
            self._dtypes[name] = dtype
            self._starts[name] = data_start + int(first)

    def read(self, name: str, box: Box) -> Tensor:
        """Read a box of one tensor in its stored dtype.

        Raises:
            CheckpointError: the file has been truncated.
        """
        tensor = torch.empty(box.shape, dtype=self._dtypes[name])
        if not box.numel:
            return tensor
        shape = self.shapes[name]
        start_in_file = self._starts[name]
        ranges = list(_byte_ranges(shape, box, tensor.itemsize, start_in_file))
        target = as_bytes(tensor)
        filled = 0
        reader = self._storage.open(self._path)
        try:
            # All ranges are known beforehand, so a store can fetch the next ones while
            # one is copied.
            reader.expect(ranges)
            for start, stop in ranges:
                size = stop - start
                reader.read_into(start, target[filled : filled + size])
                filled += size
        except EOFError as error:
            raise CheckpointError(
                f"{name} is truncated ({error})", where=self._path, code="EVO-HF-002"
            ) from None
        finally:
            reader.close()
        return tensor


def _byte_ranges(
    shape: Coordinates,
    box: Box,
    item_size: int,
    base: int,
) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the box's bytes in the file, in the order of its elements.

    Trailing dims that the box takes in full are contiguous, together with the box's
    extent of the dim before them. So one range is needed for each index into the dims
    before that. Of a tensor [4, 6, 8], the box [2, 3, 8] takes dim 2 in full: dims 1
    and 2 form ranges of 3 * 8 elements, and there are 2 of them.

    Args:
        shape: of the whole tensor.
        base: where the tensor's bytes start in the file.
    """
    first_full = len(shape)
    while first_full and box.shape[first_full - 1] == shape[first_full - 1]:
        first_full -= 1
    contiguous = max(first_full - 1, 0)  # dims from here on form one range
    length = math.prod(box.shape[contiguous:]) * item_size

    strides = []  # bytes from one index of a dim to the next
    for dim in range(len(shape)):
        inner_elements = math.prod(shape[dim + 1 :])
        strides.append(inner_elements * item_size)

    outer_dims = []
    for dim in range(contiguous):
        offset = box.offsets[dim]
        outer_dims.append(range(offset, offset + box.shape[dim]))
    inner_position = box.offsets[contiguous:]
    for outer_position in product(*outer_dims):
        position = outer_position + inner_position
        start = base + sum(map(operator.mul, position, strides))
        yield start, start + length


class PickleFile:
    """A file like ``pytorch_model.bin``.

    A local one is mapped, so tensors stay on disk until they are used.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        source = io.BytesIO(storage.read(path)) if storage.remote else path
        self._state = load_pickle(source, path)
        self.shapes = {
            name: tuple(tensor.shape) for name, tensor in self._state.items()
        }

    def read(self, name: str, box: Box) -> Tensor:
        """Read a box of one tensor in its stored dtype."""
        whole = Box.whole(self.shapes[name])
        tensor = self._state[name]
        return tensor[box.within(whole)]


def load_pickle(
    source: str | os.PathLike[str] | io.BytesIO, where: str
) -> dict[str, Tensor]:
    """Load a state dict; only tensors are unpickled, never code.

    Raises:
        CheckpointError: damaged, or it holds more than tensors.
    """
    try:
        state = _load_tensors(source)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        OSError,
        EOFError,
        ValueError,
    ) as error:
        first_line = str(error).partition("\n")[0]
        reason = first_line or type(error).__name__
        raise CheckpointError(
            f"cannot be read as tensors alone ({reason})",
            where=where,
            code="EVO-CKPT-017",
        ) from None
    values = state.values() if isinstance(state, dict) else [None]
    if not all(isinstance(value, Tensor) for value in values):
        raise CheckpointError(
            "holds more than named tensors",
            where=where,
            expected="a state dict",
            code="EVO-CKPT-017",
        )
    checked: dict[str, Tensor] = state
    return checked


def _load_tensors(source: str | os.PathLike[str] | io.BytesIO) -> Any:
    if isinstance(source, io.BytesIO):
        return torch.load(source, map_location="cpu", weights_only=True)
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    # Written before torch 1.6: not a zip file, which cannot be mapped.
    except RuntimeError:
        return torch.load(source, map_location="cpu", weights_only=True)
