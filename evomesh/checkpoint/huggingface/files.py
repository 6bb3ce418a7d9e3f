"""One weight file of another system: safetensors in any storage, or torch's pickles without running any."""

from __future__ import annotations

import io
import json
import math
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

LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


class WeightFile(Protocol):
    """Attributes:
    shapes: every tensor, read from the header alone.
    """

    shapes: dict[str, Coordinates]

    def read(self, name: str, box: Box) -> Tensor:
        """A part of one tensor, in the dtype it is stored in."""
        ...


class SafetensorsFile:
    """Reads exactly the bytes of the boxes asked for.

    Raises:
        CheckpointError: not a whole safetensors file.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        try:
            size = storage.size(path)
            length = int.from_bytes(storage.read(path, 0, 8), "little")
            if length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(storage.read(path, 8, length))
            header.pop("__metadata__", None)
            self.shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
            self._dtypes = {name: fmt.DTYPES[entry["dtype"]] for name, entry in header.items()}
            self._starts = {
                name: 8 + length + int(entry["data_offsets"][0]) for name, entry in header.items()
            }
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                if last - first != self._bytes(name) or first < 0 or 8 + length + last > size:
                    raise ValueError(f"{name}: bytes {first} to {last} of {size - length - 8}")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            EOFError,
            RecursionError,
        ) as error:
            raise CheckpointError(f"not a whole safetensors file ({error})", where=path) from None

    def _bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self._dtypes[name].itemsize

    def read(self, name: str, box: Box) -> Tensor:
        tensor = torch.empty(box.shape, dtype=self._dtypes[name])
        if not box.numel:
            return tensor
        ranges = list(_ranges(self.shapes[name], box, tensor.itemsize, self._starts[name]))
        target, filled = as_bytes(tensor), 0
        reader = self._storage.open(self._path)
        try:
            reader.expect(ranges)
            for start, stop in ranges:
                reader.read_into(start, target[filled : filled + stop - start])
                filled += stop - start
        except EOFError as error:
            raise CheckpointError(f"{name} ends early ({error})", where=self._path) from None
        finally:
            reader.close()
        return tensor


def _ranges(shape: Coordinates, box: Box, item_size: int, base: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the box's bytes in the file, in the order of its elements."""
    inner = len(shape)  # dims from here on are taken whole
    while inner and box.shape[inner - 1] == shape[inner - 1]:
        inner -= 1
    cut = max(inner - 1, 0)
    strides = [math.prod(shape[dim + 1 :]) * item_size for dim in range(len(shape))]
    length = math.prod(box.shape[cut:]) * item_size
    for index in product(*(range(o, o + n) for o, n in zip(box.offsets[:cut], box.shape[:cut], strict=True))):
        place = (*index, *box.offsets[cut:])
        start = base + sum(i * stride for i, stride in zip(place, strides, strict=True))
        yield start, start + length


class PickleFile:
    """``pytorch_model.bin`` and its like: a local one stays on disk until its tensors are used."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._state = load_pickle(io.BytesIO(storage.read(path)) if storage.remote else path, path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str, box: Box) -> Tensor:
        return self._state[name][box.within(Box.whole(self.shapes[name]))]


def load_pickle(source: str | os.PathLike[str] | io.BytesIO, where: str) -> dict[str, Tensor]:
    """A state dict; only tensors are unpickled, never code.

    Raises:
        CheckpointError: damaged, or it holds more than tensors.
    """
    try:
        try:
            state = torch.load(
                source, map_location="cpu", weights_only=True, mmap=not isinstance(source, io.BytesIO)
            )
        except RuntimeError:  # written before torch 1.6: not a zip file
            if isinstance(source, io.BytesIO):
                source.seek(0)
            state = torch.load(source, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot be read as tensors alone ({reason})", where=where) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("holds more than named tensors", where=where, expected="a state dict")
    return state
