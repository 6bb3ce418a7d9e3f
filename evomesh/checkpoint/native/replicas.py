"""Read what several ranks want once, and pass it around among them.

A thousand ranks of pure data parallelism all want the same 14 GB of a 7B's weights. Each
reads a thousandth of the pieces. What it has read travels around a ring of these ranks,
a chunk at a time, so that a rank needs two chunks of memory and two connections,
whatever the number of ranks.

Ranks are replicas of each other in a tensor if they want the same pieces of it: in data
parallelism the weights, in hybrid ZeRO the optimizer's tensors, in tensor parallelism
also what is sharded by columns where the checkpoint's pieces hold whole rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import PIECE_BYTES, canonical, sha256
from evomesh.checkpoint.native.read import (
    PieceReader,
    ReadItem,
    copy_piece,
    place_in_files,
    read_items,
)
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange

KEY_DIGITS = 24  # of a hash: no two of a million tensors will ever share one
ALIGNMENT = 8  # bytes: a tensor of any dtype may begin there


class ReplicaGroup(NamedTuple):
    """Ranks that want the same pieces, and what this one of them reads and copies.

    Attributes:
        members: ascending.
        items: in file order; the same pieces in the same order on every member.
    """

    members: list[int]
    items: list[ReadItem]


@dataclass(frozen=True)
class Chunk:
    """Pieces that travel together, at most ``PIECE_BYTES``."""

    items: tuple[ReadItem, ...]
    starts: tuple[int, ...]  # of each piece, in bytes of the chunk
    size: int


def find_replicas(items: Iterable[ReadItem], exchange: Exchange) -> list[ReplicaGroup]:
    """Return the groups of ranks with which this rank shares pieces, itself alone among them.

    All ranks call it. Two ranks list the groups that both are in in the same order.
    """
    # 1. Rank 0 learns what each rank wants of each tensor: a hash, since the pieces
    #    themselves would be a large message.
    items_of_tensor: dict[str, list[ReadItem]] = {}
    for item in items:
        items_of_tensor.setdefault(item.record.name, []).append(item)
    wanted = list(items_of_tensor.values())
    keys = [_key_of(items_of_one) for items_of_one in wanted]
    keys_by_rank = exchange.gather(keys)

    # 2. It tells each rank which ranks want the same as it does, of which tensors.
    answers = None
    if keys_by_rank is not None:
        answers = _group_by_members(keys_by_rank)
    answer = exchange.scatter(answers)

    # 3. Every rank makes the groups of the items that it wants.
    groups = []
    for members, positions in answer:
        in_group = []
        for position in positions:
            in_group += wanted[position]
        group = ReplicaGroup(members, sorted(in_group, key=place_in_files))
        groups.append(group)
    return groups


def _key_of(items: Sequence[ReadItem]) -> str:
    """Return a hash of the pieces of one tensor that a rank wants."""
    places = [place_in_files(item) for item in items]
    return sha256(canonical([items[0].record.name, places]))[:KEY_DIGITS]


def _group_by_members(keys_by_rank: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Return for each rank its groups: their members, and the positions of their keys in its list."""
    ranks_with: dict[str, list[int]] = {}
    for rank, keys in enumerate(keys_by_rank):
        for key in keys:
            ranks = ranks_with.setdefault(key, [])
            ranks.append(rank)
    answers = []
    for keys in keys_by_rank:
        positions_of: dict[tuple[int, ...], list[int]] = {}
        for position, key in enumerate(keys):
            members = tuple(ranks_with[key])
            positions = positions_of.setdefault(members, [])
            positions.append(position)
        answer = []
        # One order for all ranks: no two wait for each other in different groups.
        for members in sorted(positions_of):
            positions = positions_of[members]
            answer.append([list(members), positions])
        answers.append(answer)
    return answers


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
            ring = ReplicaRing(checkpoint, group, exchange, error)
            error = ring.run()
    if error is not None:
        raise error
    for group in groups:
        if len(group.members) == 1:
            read_items(checkpoint, group.items)


NO_PIECES = Chunk((), (), 0)


class ReplicaRing:
    """The members of a group, each of which gets chunks from the one before it.

    Args:
        error: of an earlier group: with one this rank reads nothing more.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        group: ReplicaGroup,
        exchange: Exchange,
        error: UserError | None,
    ) -> None:
        members = group.members
        size = len(members)
        position = members.index(exchange.rank)
        self._size = size
        self._position = position
        self._exchange = exchange
        self._error = error
        self._next_rank = members[(position + 1) % size]
        self._rank_before = members[position - 1]
        self._name = f"replicas:{sha256(canonical(members))[:8]}"
        self._chunks = split_into_chunks(group.items)
        own: list[ReadItem] = []
        for number in self._share(position):
            own += self._chunks[number].items
        self._reader = PieceReader(checkpoint, own)

    def run(self) -> UserError | None:
        """Fill the tensors of all members and return this rank's error, if it has one."""
        largest = 0
        for chunk in self._chunks:
            largest = max(largest, chunk.size)
        buffer = torch.empty(largest, dtype=torch.uint8)
        other = torch.empty(largest, dtype=torch.uint8)
        rounds = -(-len(self._chunks) // self._size)
        with closing(self._reader):
            for number in range(rounds):
                self._run_round(number, buffer, other)
        return self._error

    def _run_round(self, number: int, buffer: Tensor, other: Tensor) -> None:
        """Pass one chunk of each member around the ring, this rank's own to begin with."""
        # Members 0, 1 and 2 hold their own chunks a, b and c; after one step c, a and b,
        # after two b, c and a.
        chunk = self._chunk_of(self._position, number)
        self._read(chunk, buffer)
        for step in range(1, self._size):
            source = (self._position - step) % self._size
            coming = self._chunk_of(source, number)
            self._exchange.pass_on(
                buffer[: chunk.size],
                self._next_rank,
                other[: coming.size],
                self._rank_before,
                self._name,
            )
            chunk = coming
            buffer, other = other, buffer
            _copy_chunk(chunk, buffer)

    def _read(self, chunk: Chunk, buffer: Tensor) -> None:
        """Read a chunk; an error is kept, since the other members wait for this rank."""
        if self._error is not None:
            return
        try:
            for item, start in zip(chunk.items, chunk.starts, strict=True):
                data = buffer[start : start + item.size]
                self._reader.read(item, data)
                copy_piece(item, data)
        except UserError as error:
            self._error = error

    def _share(self, position: int) -> range:
        """Return the numbers of the chunks that a member reads, neighbors in the files."""
        count = len(self._chunks)
        first = position * count // self._size
        after_last = (position + 1) * count // self._size
        return range(first, after_last)

    def _chunk_of(self, position: int, number: int) -> Chunk:
        """Return the chunk that a member reads in a round; it may be empty."""
        share = self._share(position)
        return self._chunks[share[number]] if number < len(share) else NO_PIECES


def _copy_chunk(chunk: Chunk, buffer: Tensor) -> None:
    for item, start in zip(chunk.items, chunk.starts, strict=True):
        copy_piece(item, buffer[start : start + item.size])


def split_into_chunks(items: Sequence[ReadItem]) -> list[Chunk]:
    """Return the items in chunks of at most ``PIECE_BYTES``, neighbors together."""
    chunks = []
    held: list[ReadItem] = []
    starts: list[int] = []
    end = 0

    for item in items:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if held and start + item.size > PIECE_BYTES:
            chunks.append(Chunk(tuple(held), tuple(starts), end))
            held, starts, start = [], [], 0
        held.append(item)
        starts.append(start)
        end = start + item.size
    if held:
        chunks.append(Chunk(tuple(held), tuple(starts), end))
    return chunks
