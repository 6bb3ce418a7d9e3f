"""Check token files line by line, without trusting their meta."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from evomesh.data.token_files.bin_dataset import check_file
from evomesh.data.token_files.fingerprint import read_fingerprint
from evomesh.data.token_files.folders import walk
from evomesh.data.token_files.lines import BadLineError, TokenArray, largest_id, parse_line, parse_plain
from evomesh.data.token_files.meta import meta_path, read_meta
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

SHOWN = 5  # problems of each kind that are listed; the rest are counted
LEAK_SAMPLES = 200  # documents decoded to look for JSON text
LEAK_SHARE = 0.5
BLOCK_BYTES = 1 << 22  # of lines that are parsed together
BROKEN, OUTSIDE = "broken lines", "lines with ids outside the vocabulary"


@dataclass
class FileScan:
    """The content of one file, from its lines.

    Attributes:
        problems: defects that training must not meet.
        notes: what a user should know.
        offsets, lengths: [lines] as a correct meta has them.
        hashes: [lines] of the lines' bytes.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    max_id: int = -1
    zeros: int = 0
    masked: int = 0

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def scan(path: Path, vocab_size: int | None = None) -> FileScan:
    """Read every line of a token file."""
    found = FileScan(path)
    try:
        check_file(path)
    except UserError as error:
        found.problems.append(str(error))
        return found
    sizes: list[int] = []
    hashes: list[int] = []
    lengths = [np.empty(0, np.int64)]
    refused: Counter[str] = Counter()
    position = 0
    with path.open("rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            counts = np.array([line.count(b",") + 1 for line in lines])
            tokens = parse_plain(lines, counts)
            if tokens is None or (vocab_size is not None and largest_id(tokens) >= vocab_size):
                tokens, counts = _read_one_by_one(lines, len(sizes), position, vocab_size, found, refused)
            if len(tokens):
                found.max_id = max(found.max_id, largest_id(tokens))
            found.zeros += int((tokens == 0).sum())
            found.masked += int((tokens < 0).sum())
            lengths.append(counts)
            sizes += map(len, lines)
            position += sum(map(len, lines))
            hashes += map(xxhash.xxh3_64_intdigest, lines)
    for kind, count in refused.items():
        if count > SHOWN:
            found.problems.append(f"{path}: {count - SHOWN} more {kind}")
    found.offsets, found.lengths = np.cumsum([0, *sizes])[:-1], np.concatenate(lengths)
    found.hashes = np.array(hashes, np.uint64)
    if not refused[BROKEN]:
        _compare_meta(found)
    _find_repeats(found)
    _compare_fingerprint(found)
    if found.zeros:
        found.notes.append(f"{path}: id 0 occurs {found.zeros:,} times; the format cannot make it a target")
    return found


def _read_one_by_one(
    lines: list[bytes],
    number: int,
    position: int,
    vocab_size: int | None,
    found: FileScan,
    refused: Counter[str],
) -> tuple[TokenArray, NDArray[np.int64]]:
    """Return the tokens of lines and how many each has; the lines start after ``number`` lines and ``position`` bytes.

    Defects are added to ``found.problems`` and counted in ``refused``.
    """
    read: list[TokenArray] = []
    for line in lines:
        number += 1
        try:
            read.append(_tokens(line))
        except BadLineError as error:
            read.append(np.empty(0, np.int64))
            refused[BROKEN] += 1
            if refused[BROKEN] <= SHOWN:
                place = f" byte {position + error.byte}" if error.byte is not None else ""
                torn = "; the file ends in the middle of it" if not line.endswith(b"\n") else ""
                found.problems.append(f"{found.path} line {number}{place}: {error.found}{torn}")
        largest = largest_id(read[-1])
        if vocab_size is not None and largest >= vocab_size:
            refused[OUTSIDE] += 1
            if refused[OUTSIDE] <= SHOWN:
                found.problems.append(
                    f"{found.path} line {number}: id {largest} is outside the vocabulary of {vocab_size}"
                )
        position += len(line)
    return np.concatenate(read), np.array([len(tokens) for tokens in read])


def verify(
    path: str, *, vocab_size: int | None = None, tokenizer: Tokenizer | None = None, valid: str | None = None
) -> tuple[list[FileScan], list[str]]:
    """Scan a file or every file of a folder; return the scans and all problems.

    Args:
        path: a ``.bin`` or a folder.
        vocab_size: ids at or above it are problems; None with a tokenizer: the tokenizer's.
        tokenizer: decodes samples to find JSON text that was tokenized by mistake.
        valid: file or folder of validation data that must share no document with ``path``.
    """
    if tokenizer is not None and vocab_size is None:
        vocab_size = tokenizer.vocab_size
    scans = [scan(file, vocab_size) for file in _files(path)]
    problems = [problem for found in scans for problem in found.problems]
    if tokenizer is not None:
        problems += [leak for found in scans if not found.problems for leak in _json_leak(found, tokenizer)]
    if valid is not None:
        problems += _overlap(scans, [scan(file) for file in _files(valid)])
    return scans, problems


def _files(path: str) -> list[Path]:
    found = Path(path).expanduser()
    files = [file.path for file in walk(found, ".bin")] if found.is_dir() else [found]
    if not files:
        raise UserError("no .bin file below the folder", where=str(found))
    return files


def _tokens(line: bytes) -> TokenArray:
    plain = parse_plain([line], np.array([line.count(b",") + 1]))
    return np.array(parse_line(line), np.int64) if plain is None else plain


def _compare_meta(found: FileScan) -> None:
    try:
        rows = read_meta(found.path)
    except UserError as error:
        found.problems.append(str(error))
        return
    where = f"{meta_path(found.path)}"
    if len(rows) != len(found.offsets):
        found.problems.append(f"{where}: {len(rows):,} rows, the token file has {len(found.offsets):,} lines")
    count = min(len(rows), len(found.offsets))
    right = np.stack([found.offsets[:count], found.lengths[:count]], axis=1)
    wrong = np.flatnonzero((rows[:count] != right).any(axis=1))
    for row in wrong[:SHOWN]:
        found.problems.append(
            f"{where} row {row}: {tuple(rows[row].tolist())}, the line has {tuple(right[row].tolist())}"
        )
    if len(wrong) > SHOWN:
        found.problems.append(f"{where}: {len(wrong) - SHOWN:,} more wrong rows")


def _find_repeats(found: FileScan) -> None:
    """Find a block of lines right after an equal block: the file was appended twice. Other repeats are notes."""
    count = len(found.hashes)
    if count < 2:
        return
    # Sorting brings equal lines together: shift is each line's distance to the previous equal one, 0 without one.
    order = np.argsort(found.hashes, kind="stable")
    sorted_hashes = found.hashes[order]
    equals_previous = sorted_hashes[1:] == sorted_hashes[:-1]
    shift = np.zeros(count, np.int64)
    shift[order[1:][equals_previous]] = np.diff(order)[equals_previous]
    repeated = int(equals_previous.sum())
    if not repeated:
        return
    # A run of lines with the same shift repeats earlier lines in order.
    edges = np.flatnonzero(np.diff(shift)) + 1
    bounds = [0, *edges.tolist(), count]
    for low, high in pairwise(bounds):
        distance = int(shift[low])
        if distance and high - low >= max(distance, 2):
            found.problems.append(
                f"{found.path}: lines {low + 1} .. {high} repeat lines {low - distance + 1} .. {high - distance}: "
                "written twice in append mode?"
            )
            return
    found.notes.append(f"{found.path}: {repeated:,} documents occur more than once")


def _compare_fingerprint(found: FileScan) -> None:
    record = read_fingerprint(found.path)
    if record is None:
        return
    for key, value in (("documents", len(found.offsets)), ("tokens", found.tokens), ("max_id", found.max_id)):
        if key in record and record[key] != value:
            found.problems.append(f"{found.path}.json: {key} is {record[key]}, the token file has {value}")


def _json_leak(found: FileScan, tokenizer: Tokenizer) -> list[str]:
    """Return the problem that samples read like JSON records: whole lines were tokenized instead of their text."""
    picks = np.unique(np.linspace(0, len(found.offsets) - 1, LEAK_SAMPLES).astype(np.int64))
    leaks = []
    with found.path.open("rb") as file:
        for pick in picks:
            file.seek(int(found.offsets[pick]))
            ids = np.abs(_tokens(file.readline())[:64])
            text = tokenizer.decode([token for token in ids.tolist() if token < tokenizer.vocab_size]).lstrip(
                "<s> \n"
            )
            if text.startswith(('{"', "{ '", '[{"')) and '":' in text:
                leaks.append((int(pick) + 1, text[:60]))
    if len(leaks) < LEAK_SHARE * len(picks):
        return []
    line, text = leaks[0]
    return [
        f"{found.path}: {len(leaks)} of {len(picks)} samples read like JSON records (line {line}: {text!r}): "
        "whole lines were tokenized; use evomesh tokenize --text-field"
    ]


def _overlap(train: Sequence[FileScan], valid: Sequence[FileScan]) -> list[str]:
    known = np.unique(np.concatenate([found.hashes for found in train]))
    problems = []
    for found in valid:
        shared = np.flatnonzero(np.isin(found.hashes, known))
        if len(shared):
            problems.append(
                f"{found.path}: {len(shared):,} of {len(found.hashes):,} validation documents are also in training "
                f"(first: line {int(shared[0]) + 1})"
            )
    return problems
