"""Tensors of a ``.pt`` file that stay on disk: the file is mapped, and only what is used is read."""

from __future__ import annotations

import math
import os
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from evomesh.checkpoint.native.format import CheckpointError


@dataclass(frozen=True)
class FileStorage:
    """The numbers of one storage in a file.

    Attributes:
        position: of its first byte in the file.
        count: numbers in it.
        checksum: CRC-32 of its bytes, as the file states it.
    """

    path: str
    position: int
    dtype: torch.dtype
    count: int
    checksum: int

    @cached_property
    def numbers(self) -> Tensor:
        """Map the file and return the numbers, [count].

        Raises:
            CheckpointError: the bytes are not those that were written.
        """
        mapped = torch.from_file(
            self.path, shared=False, size=os.path.getsize(self.path), dtype=torch.uint8
        )
        size = self.count * self.dtype.itemsize
        stored = mapped[self.position : self.position + size]
        checksum = zlib.crc32(stored.numpy().data)
        if len(stored) < size or checksum != self.checksum:
            raise CheckpointError(
                f"{size} bytes of a tensor are damaged: their checksum differs from the one in the file",
                where=self.path,
                expected="the bytes that were written",
                fix="copy the file again",
                code="EVO-CKPT-003",
            )
        return stored.view(self.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; nothing of it is read before ``read``."""

    storage: FileStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """Return a view of the mapped file."""
        numbers = self.storage.numbers
        # as_strided counts from the start of the mapped file, not of ``numbers``.
        offset = numbers.storage_offset() + self.offset
        return torch.as_strided(numbers, self.shape, self.stride, offset)


def check_view(
    count: int, offset: int, shape: Sequence[int], stride: Sequence[int]
) -> None:
    """Refuse a view that reaches out of a storage of ``count`` numbers, or repeats them.

    A stride of 0 makes one number stand for any count of them, which a copy would then
    have to hold.

    Raises:
        pickle.UnpicklingError: it is such a view.
    """
    numbers = (offset, *shape, *stride)
    are_counts = all(type(number) is int and number >= 0 for number in numbers)
    if len(shape) != len(stride) or not are_counts:
        raise pickle.UnpicklingError("a tensor in it has an impossible shape")
    # The position of the last element: that of shape [2, 3] with stride [3, 1] is
    # offset + 1 * 3 + 2 * 1.
    last = offset
    for size, step in zip(shape, stride, strict=True):
        last += (size - 1) * step
    elements = math.prod(shape)
    reaches_out = elements > 0 and last >= count
    if elements > count or reaches_out:
        raise pickle.UnpicklingError(
            f"a tensor in it has the shape {list(shape)}, its storage {count} numbers"
        )
