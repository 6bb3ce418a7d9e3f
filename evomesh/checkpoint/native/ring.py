"""Read what several ranks want once, and pass it around among them.

A thousand ranks of pure data parallelism all want the same 14 GB of a 7B's weights. Each
reads a thousandth of them. What it has read travels around a ring of these ranks, a
chunk at a time, so that a rank needs two chunks of memory and two connections, whatever
the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from evomesh.checkpoint.native.format import canonical, sha256
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange

KEY_DIGITS = 24  # of a hash: no two of a million tensors will ever share one
ALIGNMENT = 8  # bytes: a tensor of any dtype may begin there


class RingItem(Protocol):
    """Bytes that travel as one.

    Attributes:
        size: in bytes.
    """

    @property
    def size(self) -> int: ...


Item = TypeVar("Item", bound=RingItem)
Item_contra = TypeVar("Item_contra", bound=RingItem, contravariant=True)


class ItemSource(Protocol[Item_contra]):
    """A reader of items, which knows where this rank wants them."""

    def read(self, item: Item_contra, data: Tensor) -> None:
        """Fill ``data`` with the bytes of an item.

        Raises:
            UserError: it cannot be read.
        """

    def copy(self, item: Item_contra, data: Tensor) -> None:
        """Copy the bytes of an item to where this rank wants them."""


class Replicas(NamedTuple):
    """Ranks that want the same, and positions in the list of what this one of them wants.

    Attributes:
        members: ascending.
    """

    members: list[int]
    positions: list[int]

    def to_json(self) -> list[Any]:
        """Return a message of them, which stays short with many members."""
        return [to_runs(self.members), self.positions]

    @classmethod
    def from_json(cls, message: list[Any]) -> Replicas:
        """Take back what ``to_json`` made."""
        runs, positions = message
        return cls(from_runs(runs), positions)


def key_of(value: Any) -> str:
    """Return a hash of what a rank wants: the description itself would be a large message."""
    return sha256(canonical(value))[:KEY_DIGITS]


def find_members(keys: Sequence[str], exchange: Exchange) -> list[Replicas]:
    """Return the groups of ranks that have keys in common with this rank, itself alone among them.

    All ranks call it. Two ranks list the groups that both are in in the same order.

    Args:
        keys: of what this rank wants; equal on ranks that want the same.
    """
    keys_by_rank = exchange.gather(list(keys))
    answers = None
    if keys_by_rank is not None:
        answers = []
        for groups in group_by_members(keys_by_rank):
            answer = [group.to_json() for group in groups]
            answers.append(answer)
    messages = exchange.scatter(answers)
    own_groups = map(Replicas.from_json, messages)
    return list(own_groups)


def group_by_members(keys_by_rank: Sequence[Sequence[str]]) -> list[list[Replicas]]:
    """Return for each rank its groups: their members, and the positions of their keys in its list."""
    ranks_with: dict[str, list[int]] = {}
    for rank, keys in enumerate(keys_by_rank):
        for key in keys:
            members_of_key = ranks_with.setdefault(key, [])
            members_of_key.append(rank)

    # Groups get numbers: to compare the members of each key on each rank would take time
    # that grows with the square of the ranks. One order for all ranks, so that no two
    # wait for each other in different groups.
    in_order = sorted(map(tuple, ranks_with.values()))
    number_of_members: dict[tuple[int, ...], int] = {}
    members_of: list[list[int]] = []
    for members in dict.fromkeys(in_order):
        number = len(members_of)
        number_of_members[members] = number
        members_of.append(list(members))
    number_of = {}
    for key, ranks in ranks_with.items():
        members = tuple(ranks)
        number = number_of_members[members]
        number_of[key] = number

    answers = []
    for keys in keys_by_rank:
        numbers = [number_of[key] for key in keys]
        groups = _groups_of_rank(numbers, members_of)
        answers.append(groups)
    return answers


def _groups_of_rank(
    numbers: Sequence[int], members_of: Sequence[list[int]]
) -> list[Replicas]:
    """Return the groups of a rank; ``numbers`` are those of the groups of its keys."""
    positions_of: dict[int, list[int]] = {}
    for position, number in enumerate(numbers):
        positions_of.setdefault(number, []).append(position)
    groups = []
    for number in sorted(positions_of):
        group = Replicas(members_of[number], positions_of[number])
        groups.append(group)
    return groups


def to_runs(members: Sequence[int]) -> list[list[int]]:
    """Return ascending numbers as runs [first, distance, count]: all of 16,384 ranks are one short message."""
    runs: list[list[int]] = []
    for member in members:
        if runs:
            first, distance, count = runs[-1]
            if count == 1:
                runs[-1] = [first, member - first, 2]
                continue
            if member == first + distance * count:
                runs[-1][2] += 1
                continue
        runs.append([member, 1, 1])
    return runs


def from_runs(runs: Sequence[Sequence[int]]) -> list[int]:
    """Return the numbers of ``to_runs``."""
    members: list[int] = []
    for first, distance, count in runs:
        members += range(first, first + distance * count, distance)
    return members


@dataclass(frozen=True)
class Chunk(Generic[Item]):
    """Items that travel together."""

    items: tuple[Item, ...]
    starts: tuple[int, ...]  # of each item, in bytes of the chunk
    size: int


def split_into_chunks(items: Sequence[Item], limit: int) -> list[Chunk[Item]]:
    """Return the items in chunks of at most ``limit`` bytes, neighbors together; a larger one is alone."""
    chunks = []
    held: list[Item] = []
    starts: list[int] = []
    end = 0

    for item in items:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if held and start + item.size > limit:
            chunk = Chunk(tuple(held), tuple(starts), end)
            chunks.append(chunk)
            held = []
            starts = []
            start = 0
        held.append(item)
        starts.append(start)
        end = start + item.size
    if held:
        last = Chunk(tuple(held), tuple(starts), end)
        chunks.append(last)
    return chunks


class ReplicaRing(Generic[Item]):
    """The ranks of a group, each of which gets chunks from the one before it.

    Args:
        chunks: the same on all members.
        error: of an earlier group: with one this rank reads nothing more.
    """

    def __init__(
        self,
        members: Sequence[int],
        chunks: Sequence[Chunk[Item]],
        exchange: Exchange,
        error: UserError | None = None,
    ) -> None:
        size = len(members)
        position = members.index(exchange.rank)
        self._size = size
        self._position = position
        self._exchange = exchange
        self._error = error
        self._next_rank = members[(position + 1) % size]
        self._rank_before = members[position - 1]
        self._name = f"replicas:{sha256(canonical(list(members)))[:8]}"
        self._chunks = chunks

    @property
    def own_items(self) -> list[Item]:
        """Return what this rank reads."""
        own: list[Item] = []
        for number in self._share(self._position):
            own += self._chunks[number].items
        return own

    def run(self, source: ItemSource[Item]) -> UserError | None:
        """Fill the tensors of all members and return this rank's error, if it has one."""
        largest = 0
        for chunk in self._chunks:
            largest = max(largest, chunk.size)
        buffer = torch.empty(largest, dtype=torch.uint8)
        other = torch.empty_like(buffer)
        # Each member reads one chunk in a round, in the last one perhaps none.
        num_chunks = len(self._chunks)
        num_members = self._size
        rounds = -(-num_chunks // num_members)
        for number in range(rounds):
            self._run_round(source, number, buffer, other)
        return self._error

    def _run_round(
        self, source: ItemSource[Item], number: int, buffer: Tensor, other: Tensor
    ) -> None:
        """Pass one chunk of each member around the ring, this rank's own to begin with."""
        # Members 0, 1 and 2 hold their own chunks a, b and c; after one step c, a and b,
        # after two b, c and a.
        chunk = self._chunk_of(self._position, number)
        self._read(source, chunk, buffer)
        for step in range(1, self._size):
            reader = (self._position - step) % self._size
            coming = self._chunk_of(reader, number)
            self._exchange.pass_on(
                buffer[: chunk.size],
                self._next_rank,
                other[: coming.size],
                self._rank_before,
                self._name,
            )
            chunk = coming
            buffer, other = other, buffer
            for item, data in _items_in(chunk, buffer):
                source.copy(item, data)

    def _read(
        self, source: ItemSource[Item], chunk: Chunk[Item], buffer: Tensor
    ) -> None:
        """Read a chunk; an error is kept, since the other members wait for this rank."""
        if self._error is not None:
            return
        try:
            for item, data in _items_in(chunk, buffer):
                source.read(item, data)
                source.copy(item, data)
        except UserError as error:
            self._error = error

    def _share(self, position: int) -> range:
        """Return the numbers of the chunks that a member reads, neighbors in the files."""
        count = len(self._chunks)
        first = position * count // self._size
        after_last = (position + 1) * count // self._size
        return range(first, after_last)

    def _chunk_of(self, position: int, number: int) -> Chunk[Item]:
        """Return the chunk that a member reads in a round; it may be empty."""
        share = self._share(position)
        if number < len(share):
            return self._chunks[share[number]]
        return Chunk((), (), 0)


def _items_in(chunk: Chunk[Item], buffer: Tensor) -> list[tuple[Item, Tensor]]:
    """Return the items of a chunk with their bytes."""
    return [
        (item, buffer[start : start + item.size])
        for item, start in zip(chunk.items, chunk.starts, strict=True)
    ]
