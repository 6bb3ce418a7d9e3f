"""Find documents that are in a folder more than once: exactly by a hash, nearly by MinHash.

A MinHash signature (Broder, "On the resemblance and containment of documents", 1997) has
for each of many hash functions the smallest value over the document's shingles; the share of equal entries of
two signatures estimates the Jaccard similarity of their sets of shingles. Documents
that agree in a band of the signature are compared, others never.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

SHINGLE = 5  # units
PERMUTATIONS = 128
BANDS = 32  # of 4 entries: documents of similarity 0.8 agree in one with probability 0.9999999
SIMILAR = 0.8
SHINGLES_TOGETHER = 4096
MAX_DIGESTS = 4_000_000  # documents, about 130 MB
MAX_SIGNATURES = 100_000  # documents, about 51 MB
SEED = 1997
FACTOR = np.uint64(0x9E3779B97F4A7C15)
SHIFT = np.uint64(32)
LARGEST = np.uint64(2**64 - 1)

Numbers = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Signatures = NDArray[np.uint32]


@dataclass(frozen=True)
class DuplicateGroup:
    """Documents that are the same, or nearly.

    Attributes:
        documents: their numbers, in order.
        tokens: of all but the first.
    """

    documents: list[int]
    tokens: int


@dataclass(frozen=True)
class DuplicateFigures:
    """The duplicates that were found among the documents that were looked at.

    Attributes:
        looked_at, looked_at_tokens: documents, and their tokens.
        share: the share of all documents that were read which these are.
        groups: all groups, the largest first.
    """

    looked_at: int
    looked_at_tokens: int
    share: float
    groups: list[DuplicateGroup]

    @property
    def repeats(self) -> int:
        """Documents that repeat an earlier one."""
        return sum(len(group.documents) - 1 for group in self.groups)

    @property
    def repeated_tokens(self) -> int:
        """Tokens of these."""
        return sum(group.tokens for group in self.groups)


def digest_of(content: bytes) -> tuple[int, int]:
    """Return 128 bits that only equal documents share."""
    whole = xxhash.xxh3_128_intdigest(content)
    return whole >> 64, whole & (2**64 - 1)


class _GrowingTable:
    """Rows of unsigned 64-bit numbers, which grow by doubling."""

    def __init__(self, columns: int) -> None:
        self._rows = np.empty((1024, columns), np.uint64)
        self.count = 0

    def append(self, row: tuple[int, ...]) -> None:
        if self.count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self.count] = row
        self.count += 1

    @property
    def rows(self) -> Hashes:
        return self._rows[: self.count]

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        kept = self.rows[chosen]
        self.count = len(kept)
        self._rows[: self.count] = kept


class ExactDuplicates:
    """Finds equal documents by their digests.

    Past ``limit`` documents only those are kept whose digest ends in so many zero bits:
    equal documents have equal digests, so that a share of the groups is kept whole.
    """

    def __init__(self, limit: int = MAX_DIGESTS) -> None:
        self._limit = limit
        self._zero_bits = 0
        self._table = _GrowingTable(4)  # high, low, number, tokens

    def add(self, number: int, content: bytes, tokens: int) -> None:
        """Note a document; ``number`` grows from one to the next."""
        high, low = digest_of(content)
        mask = 2**self._zero_bits - 1
        if low & mask:
            return
        row = (high, low, number, tokens)
        self._table.append(row)
        while self._table.count > self._limit:
            self._drop_half()

    def _drop_half(self) -> None:
        """Keep the documents whose digests end in one more zero bit."""
        self._zero_bits += 1
        mask = np.uint64(2**self._zero_bits - 1)
        ends = self._table.rows[:, 1] & mask
        self._table.keep(ends == 0)

    def figures(self) -> DuplicateFigures:
        """Return the groups of equal documents."""
        high, low, numbers, tokens = self._table.rows.T
        order = np.lexsort((numbers, low, high))
        ordered = self._table.rows[order]
        digests = ordered[:, :2]
        differs = digests[1:] != digests[:-1]
        is_new = np.any(differs, axis=1)
        starts = np.flatnonzero(is_new) + 1
        groups = []
        for members in np.split(ordered, starts):
            if len(members) > 1:
                group = _group_of_rows(members)
                groups.append(group)
        return DuplicateFigures(
            looked_at=len(order),
            looked_at_tokens=int(tokens.sum()),
            share=0.5**self._zero_bits,
            groups=_largest_first(groups),
        )


def _group_of_rows(members: Hashes) -> DuplicateGroup:
    numbers = members[:, 2].astype(np.int64)
    repeated = members[1:, 3]
    return DuplicateGroup(numbers.tolist(), int(repeated.sum()))


def _largest_first(groups: list[DuplicateGroup]) -> list[DuplicateGroup]:
    return sorted(groups, key=lambda group: (-group.tokens, group.documents))


def shingles_of(units: Numbers) -> Hashes:
    """Return a hash of each run of ``SHINGLE`` units, of a shorter document one of all of it."""
    values = units.astype(np.uint64)
    width = min(SHINGLE, len(values))
    if not width:
        return np.zeros(1, np.uint64)
    count = len(values) - width + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(width):
        end = offset + count
        hashes += values[offset:end]
        hashes *= FACTOR
        hashes ^= hashes >> SHIFT
    return np.unique(hashes)


class SignatureMaker:
    """The hash functions of all signatures: multiply and add in 64 bits, of which the upper 32 are used."""

    def __init__(self) -> None:
        numbers = _random_numbers(2 * PERMUTATIONS)
        columns = numbers.reshape(-1, 1)
        factors, terms = np.split(columns, 2)
        self._factors = factors | np.uint64(1)  # an odd factor loses nothing
        self._terms = terms

    def signature(self, units: Numbers) -> Signatures:
        """Return the smallest value of each hash function over a document's shingles."""
        shingles = shingles_of(units)
        smallest = np.full(PERMUTATIONS, LARGEST)
        for start in range(0, len(shingles), SHINGLES_TOGETHER):
            stop = start + SHINGLES_TOGETHER
            part = shingles[start:stop]
            hashed = self._factors * part
            hashed += self._terms
            lowest = hashed.min(axis=1)
            smallest = np.minimum(smallest, lowest)
        upper = smallest >> SHIFT
        return upper.astype(np.uint32)


def _random_numbers(count: int) -> Hashes:
    """Return numbers of 64 random bits, always the same."""
    generator = np.random.default_rng(SEED)
    size = count * np.uint64(0).itemsize
    content = generator.bytes(size)
    return np.frombuffer(content, np.uint64)


class _SignedDocument(NamedTuple):
    """A document and its signature.

    Attributes:
        number: among those that are read.
    """

    number: int
    tokens: int
    signature: Signatures


class NearDuplicates:
    """Finds documents with most of their shingles in common, among different ones.

    Past ``limit`` documents every second one is dropped, and from then on every second
    one looked at, and so forth.
    """

    def __init__(self, limit: int = MAX_SIGNATURES) -> None:
        self._limit = limit
        self._maker = SignatureMaker()
        self._stride = 1
        self._seen: set[tuple[int, int]] = set()
        self._signed: list[_SignedDocument] = []

    def add(self, number: int, content: bytes, units: Numbers) -> None:
        """Note a document; ``number`` counts those that are read from 0."""
        if number % self._stride:
            return
        digest = digest_of(content)
        if digest in self._seen:
            return
        self._seen.add(digest)
        signature = self._maker.signature(units)
        document = _SignedDocument(number, len(units), signature)
        self._signed.append(document)
        if len(self._signed) > self._limit:
            self._halve()

    def _halve(self) -> None:
        """Keep every second document."""
        self._stride *= 2
        kept = []
        for document in self._signed:
            if document.number % self._stride == 0:
                kept.append(document)
        self._signed = kept

    def figures(self) -> DuplicateFigures:
        """Return the groups of similar documents: each is similar to another of its group."""
        leader = list(range(len(self._signed)))
        for first, second in self._similar_pairs():
            one = _leader_of(leader, first)
            other = _leader_of(leader, second)
            leader[max(one, other)] = min(one, other)
        groups = self._groups(leader)
        return DuplicateFigures(
            looked_at=len(self._signed),
            looked_at_tokens=sum(document.tokens for document in self._signed),
            share=1 / self._stride,
            groups=_largest_first(groups),
        )

    def _groups(self, leader: list[int]) -> list[DuplicateGroup]:
        """Return the groups of several documents with one leader."""
        members: dict[int, list[int]] = {}
        for place in range(len(leader)):
            first = _leader_of(leader, place)
            members.setdefault(first, []).append(place)
        several = [places for places in members.values() if len(places) > 1]
        return [self._group(places) for places in several]

    def _group(self, places: list[int]) -> DuplicateGroup:
        documents = [self._signed[place] for place in places]
        numbers = [document.number for document in documents]
        repeated = sum(document.tokens for document in documents[1:])
        return DuplicateGroup(numbers, repeated)

    def _similar_pairs(self) -> Iterator[tuple[int, int]]:
        if not self._signed:
            return
        signatures = [document.signature for document in self._signed]
        table = np.stack(signatures)
        for columns in np.split(table, BANDS, axis=1):
            band = np.ascontiguousarray(columns)
            for places in _equal_rows(band):
                # Each is compared with the first: a boilerplate that a million share
                # must not give a million times a million pairs.
                first = int(places[0])
                others = places[1:]
                is_equal = table[others] == table[first]
                similarity = is_equal.mean(axis=1)
                similar = others[similarity >= SIMILAR]
                for other in similar.tolist():
                    yield first, other


def _equal_rows(rows: Signatures) -> Iterator[Numbers]:
    """Yield the places of rows that are equal, two or more at a time, in ascending order."""
    order = np.lexsort(rows.T)  # stable
    ordered = rows[order]
    differs = ordered[1:] != ordered[:-1]
    is_new = np.any(differs, axis=1)
    last_of_group = np.flatnonzero(is_new)
    starts = last_of_group + 1
    for places in np.split(order, starts):
        if len(places) > 1:
            yield places


def _leader_of(leader: list[int], place: int) -> int:
    """Return the first of the group that a document is in, and shorten the way to it."""
    while leader[place] != place:
        leader[place] = leader[leader[place]]
        place = leader[place]
    return place
