"""Read the pieces that several ranks want once, and pass them around among them.

Ranks are replicas of each other in a tensor if they want the same pieces of it: in data
parallelism the weights, in hybrid ZeRO the optimizer's tensors, in tensor parallelism
also what is sharded by columns where the checkpoint's pieces hold whole rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import NamedTuple

from torch import Tensor

from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import PIECE_BYTES
from evomesh.checkpoint.native.read import (
    PieceReader,
    ReadItem,
    copy_piece,
    place_in_files,
    read_items,
)
from evomesh.checkpoint.native.ring import (
    ReplicaRing,
    find_members,
    key_of,
    split_into_chunks,
)
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange


class ReplicaGroup(NamedTuple):
    """Ranks that want the same pieces, and what this one of them reads and copies.

    Attributes:
        members: ascending.
        items: in file order; the same pieces in the same order on every member.
    """

    members: list[int]
    items: list[ReadItem]


class PieceSource:
    """Pieces of a checkpoint, read by ``reader``."""

    def __init__(self, reader: PieceReader) -> None:
        self._reader = reader

    def read(self, item: ReadItem, data: Tensor) -> None:
        self._reader.read(item, data)

    def copy(self, item: ReadItem, data: Tensor) -> None:
        copy_piece(item, data)


def find_replicas(items: Iterable[ReadItem], exchange: Exchange) -> list[ReplicaGroup]:
    """Return the groups of ranks with which this rank shares pieces, itself alone among them.

    All ranks call it. Two ranks list the groups that both are in in the same order.
    """
    items_of_tensor: dict[str, list[ReadItem]] = {}
    for item in items:
        of_tensor = items_of_tensor.setdefault(item.record.name, [])
        of_tensor.append(item)
    wanted = list(items_of_tensor.values())
    keys = list(map(key_of_items, wanted))
    groups = []
    for members, positions in find_members(keys, exchange):
        in_group = []
        for position in positions:
            in_group += wanted[position]
        in_group.sort(key=place_in_files)
        group = ReplicaGroup(members, in_group)
        groups.append(group)
    return groups


def key_of_items(items: Sequence[ReadItem]) -> str:
    """Return a hash of the pieces of one tensor that a rank wants."""
    places = [place_in_files(item) for item in items]
    return key_of([items[0].record.name, places])


def read_with_replicas(
    checkpoint: Checkpoint, groups: Sequence[ReplicaGroup], exchange: Exchange
) -> None:
    """Read each group's pieces once and copy them into the tensors of all its members.

    All ranks call it with the answer of ``find_replicas``.

    Raises:
        UserError: that of the first piece that this rank could not read; it has passed on
            everything that others need to get to the end, and reads nothing more.
    """
    error: UserError | None = None
    for group in groups:
        if len(group.members) > 1:
            chunks = split_into_chunks(group.items, PIECE_BYTES)
            ring = ReplicaRing(group.members, chunks, exchange, error)
            with closing(PieceReader(checkpoint, ring.own_items)) as reader:
                error = ring.run(PieceSource(reader))
    if error is not None:
        raise error
    for group in groups:
        if len(group.members) == 1:
            read_items(checkpoint, group.items)
