"""Who writes what: every element of every tensor by exactly one rank, decided once per layout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evomesh.checkpoint.native.boxes import Box, Coordinates, LocalPart, covers_once, parts_of
from evomesh.checkpoint.native.format import DTYPE_NAMES, DTYPES, CheckpointError, canonical, sha256
from evomesh.parallel.exchange import Exchange
from evomesh.parallel.grid import Grid


@dataclass(frozen=True)
class LocalTensor:
    """A named tensor of this rank: global shape, dtype name and the parts held here."""

    name: str
    dtype: str
    shape: Coordinates
    parts: list[LocalPart]


@dataclass(frozen=True)
class WriteItem:
    """One box that this rank writes."""

    name: str
    dtype: str
    shape: Coordinates
    part: LocalPart


@dataclass(frozen=True)
class SavePlan:
    """``owned``: (name, number of the part) that this rank writes; ``tensors``: (dtype, shape) of all, on rank 0."""

    owned: list[tuple[str, int]]
    tensors: dict[str, tuple[str, Coordinates]]

    @property
    def total_bytes(self) -> int:
        """Of all tensors, on rank 0."""
        return sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in self.tensors.values())

    def entries(self, local: dict[str, LocalTensor]) -> list[WriteItem]:
        """What to write, in the order of the file."""
        entries = []
        for name, number in self.owned:
            tensor = local[name]
            entries.append(WriteItem(name, tensor.dtype, tensor.shape, tensor.parts[number]))
        return in_file_order(entries)


def in_file_order(entries: list[WriteItem]) -> list[WriteItem]:
    """Largest items first: so every offset in the file is a multiple of its item size."""
    return sorted(entries, key=lambda e: (-DTYPES[e.dtype].itemsize, e.name, e.part.box.offsets))


def describe(tensors: Mapping[str, Tensor], grid: Grid) -> dict[str, LocalTensor]:
    """Places every tensor of this rank.

    Raises:
        ValueError: a tensor without a place in its global shape, or of a dtype that the format has not.
    """
    local = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: a checkpoint cannot hold {tensor.dtype}")
        try:
            shape, parts = parts_of(tensor, grid)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        local[name] = LocalTensor(name, DTYPE_NAMES[tensor.dtype], shape, parts)
    return local


def signature(local: Mapping[str, LocalTensor]) -> str:
    """Changes when the layout of this rank's tensors does."""
    return sha256(canonical(_rows(local)))


def _rows(local: Mapping[str, LocalTensor]) -> list[list[Any]]:
    return [
        [t.name, t.dtype, list(t.shape), [[list(p.box.offsets), list(p.box.shape)] for p in t.parts]]
        for t in local.values()
    ]


def make_plan(local: Mapping[str, LocalTensor], exchange: Exchange) -> SavePlan:
    """Gives each distinct box to the least loaded rank that holds it.

    Raises:
        CheckpointError: on every rank, when ranks disagree about a tensor or their boxes do not cover it exactly once.
    """
    gathered = exchange.gather(_rows(local))
    answer: dict[str, Any] | None = None
    tensors: dict[str, tuple[str, Coordinates]] = {}
    if gathered is not None:
        try:
            owned, tensors = assign(gathered)
            answer = {"owned": owned}
        except CheckpointError as error:
            answer = {"error": error.found}
    answer = exchange.broadcast(answer)
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return SavePlan([(name, number) for name, number in answer["owned"][exchange.rank]], tensors)


def assign(gathered: list[Any]) -> tuple[list[list[Any]], dict[str, tuple[str, Coordinates]]]:
    """Owned parts by rank, and all tensors."""
    tensors: dict[str, tuple[str, Coordinates]] = {}
    first: dict[str, int] = {}
    holders: dict[str, dict[Box, list[tuple[int, int]]]] = defaultdict(dict)
    for rank, rows in enumerate(gathered):
        for name, dtype, shape, boxes in rows:
            known = tensors.setdefault(name, (dtype, tuple(shape)))
            first.setdefault(name, rank)
            if known != (dtype, tuple(shape)):
                raise CheckpointError(
                    f"{name}: rank {rank} has {dtype}{shape}, rank {first[name]} has {known[0]}{list(known[1])}"
                )
            for number, (offsets, size) in enumerate(boxes):
                holders[name].setdefault(Box(tuple(offsets), tuple(size)), []).append((rank, number))
    load = [0] * len(gathered)
    owned: list[list[Any]] = [[] for _ in gathered]
    for name, (dtype, shape) in tensors.items():
        check_cover(name, shape, list(holders[name]))
        for box, ranks in holders[name].items():
            rank, number = min(ranks, key=lambda holder: load[holder[0]])
            load[rank] += box.numel * DTYPES[dtype].itemsize
            owned[rank].append([name, number])
    return owned, tensors


def check_cover(name: str, shape: Coordinates, boxes: list[Box]) -> None:
    if not covers_once(shape, boxes):
        places = ", ".join(f"{list(b.offsets)}+{list(b.shape)}" for b in boxes[:8])
        raise CheckpointError(f"{name}{list(shape)}: local boxes overlap or leave a hole: {places}")
