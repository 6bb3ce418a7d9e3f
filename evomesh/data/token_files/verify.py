"""Check token files line by line, without trusting their meta."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from evomesh.data.token_files.bin_dataset import (
    count_targets,
    evenly_spaced,
    without_target,
)
from evomesh.data.token_files.file_check import UnreadableFileError, check_file
from evomesh.data.token_files.fingerprint import (
    other_tokenizer_warning,
    read_fingerprint,
)
from evomesh.data.token_files.folders import TokenFile, find_bins, group_sets
from evomesh.data.token_files.lines import (
    MAX_ID,
    BadLineError,
    TokenArray,
    largest_id,
    parse_line,
    parse_plain,
)
from evomesh.data.token_files.meta import meta_path, read_meta
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

SHOWN = 5  # problems of each kind that are listed; the rest are counted
LEAK_SAMPLES = 200  # documents decoded to look for JSON text
LEAK_TOKENS = 64  # decoded of each
LEAK_SHARE = 0.5  # of the samples: from here on it is a problem
BLOCK_BYTES = 1 << 22  # of lines that are parsed together
BROKEN = "broken lines"
OUTSIDE = "lines with ids outside the vocabulary"


@dataclass
class FileScan:
    """Content of one file, from its lines.

    Attributes:
        problems: defects that would break training or train on wrong data.
        notes: what a user should know.
        refused: number of lines by kind of defect; only the first of each kind are problems.
        offsets, lengths: [lines] as a correct meta has them.
        hashes: [lines] hash of each line's bytes.
        max_id: largest absolute id.
        zeros: number of ids 0.
        masked: number of negative ids.
        targets: number of ids that can be targets where no target crosses documents.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    max_id: int = -1
    zeros: int = 0
    masked: int = 0
    targets: int = 0

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def refuse_line(self, kind: str, problem: str) -> None:
        """Count a line with a defect; the first ``SHOWN`` of a kind are listed."""
        self.refused[kind] += 1
        if self.refused[kind] <= SHOWN:
            self.problems.append(problem)


def scan_file(path: Path, vocab_size: int | None = None) -> FileScan:
    """Read every line of a token file and compare them with its meta and fingerprint.

    Raises:
        UnreadableFileError, OSError: the system refuses to read it, so nothing is found out about its content.
    """
    scan = FileScan(path)
    try:
        check_file(path)
    except UnreadableFileError:
        raise
    except UserError as error:
        scan.problems.append(str(error))
        return scan
    _read_lines(scan, vocab_size)
    for kind, count in scan.refused.items():
        if count > SHOWN:
            scan.problems.append(f"{path}: {count - SHOWN} more {kind}")
    # Without the tokens of every line there is nothing to compare the meta with.
    if not scan.refused[BROKEN]:
        _compare_meta(scan)
        if scan.tokens and not scan.targets:
            scan.problems.append(str(without_target(scan.tokens, str(path))))
    _find_repeats(scan)
    _compare_fingerprint(scan)
    if scan.zeros:
        scan.notes.append(
            f"{path}: id 0 occurs {scan.zeros:,} times; the format cannot make it a target"
        )
    return scan


def _read_lines(scan: FileScan, vocab_size: int | None) -> None:
    """Read a file in blocks of lines and enter what it contains into ``scan``."""
    sizes: list[int] = []
    hashes: list[int] = []
    lengths = [np.empty(0, np.int64)]
    position = 0
    if vocab_size is None:
        vocab_size = MAX_ID + 1
    with scan.path.open("rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            # Parse the block in one go; only a block with a defect is read line by
            # line.
            counts = np.array([line.count(b",") + 1 for line in lines])
            tokens = parse_plain(lines, counts)
            if tokens is None or largest_id(tokens) >= vocab_size:
                tokens, counts = _read_one_by_one(
                    scan,
                    lines,
                    len(sizes),
                    position,
                    vocab_size,
                )
            if len(tokens):
                scan.max_id = max(scan.max_id, largest_id(tokens))
            is_zero = tokens == 0
            is_masked = tokens < 0
            scan.zeros += int(is_zero.sum())
            scan.masked += int(is_masked.sum())
            scan.targets += count_targets(tokens, counts)
            lengths.append(counts)
            hashes += map(xxhash.xxh3_64_intdigest, lines)
            sizes += map(len, lines)
            position = file.tell()
    # A line starts where those before it end: sizes 10, 20 and 5 give the offsets 0, 10
    # and 30.
    ends = np.cumsum([0, *sizes])
    scan.offsets = ends[:-1]
    scan.lengths = np.concatenate(lengths)
    scan.hashes = np.array(hashes, np.uint64)


def _read_one_by_one(
    scan: FileScan, lines: list[bytes], number: int, position: int, vocab_size: int
) -> tuple[TokenArray, NDArray[np.int64]]:
    """Return the tokens of lines and how many each has; enter defects into ``scan``.

    Args:
        number: number of lines before these.
        position: bytes before them.
    """
    documents: list[TokenArray] = []
    for line in lines:
        number += 1
        tokens = np.empty(0, np.int64)
        try:
            tokens = _parse_tokens(line)
        except BadLineError as bad:
            torn = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
            scan.refuse_line(
                BROKEN,
                f"{bad.location(scan.path, number, position)}: {bad.found}{torn}",
            )
        largest = largest_id(tokens)
        if largest >= vocab_size:
            scan.refuse_line(
                OUTSIDE,
                f"{scan.path} line {number}: id {largest} is outside the vocabulary of {vocab_size}",
            )
        documents.append(tokens)
        position += len(line)
    lengths = np.array([len(tokens) for tokens in documents])
    return np.concatenate(documents), lengths


def verify(
    path: str,
    *,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    valid: str | None = None,
    min_length: int = 0,
    valid_min_length: int = 0,
) -> tuple[list[FileScan], list[str]]:
    """Scan a file or every file of a folder; return the scans and all problems.

    Args:
        path: a ``.bin`` or a folder.
        vocab_size: ids at or above it are problems; None with a tokenizer: the tokenizer's.
        tokenizer: must have made the files; decodes samples to find JSON text that was tokenized by mistake.
        valid: file or folder of validation data that must share no document with ``path``.
        min_length: documents with fewer tokens are left out of training.
        valid_min_length: of validation.

    Raises:
        UserError: there is no token file at one of the paths, or one is in both.
    """
    # 1. The files, none of them on both sides.
    if tokenizer is not None and vocab_size is None:
        vocab_size = tokenizer.vocab_size
    files = find_bins(path)
    valid_files = find_bins(valid) if valid is not None else []
    _refuse_shared_file(files, valid_files)

    # 2. Training data: one set, whatever its folders.
    scans = [scan_file(file.path, vocab_size) for file in files]
    problems = _find_other_tokenizer([*files, *valid_files], tokenizer)
    for scan in scans:
        problems += scan.problems or _find_json_text(scan, tokenizer)
    problems += _find_short_files(path, scans, min_length)
    _note_equal_files(scans)

    # 3. Validation data: each folder is a set, and needs a document that is long
    # enough.
    valid_sets = group_sets(valid_files, str(valid))
    for name, members in valid_sets.items():
        scans_of_set = [scan_file(file.path, vocab_size) for file in members]
        for scan in scans_of_set:
            problems += scan.problems
        problems += _find_short(name, scans_of_set, valid_min_length)
        problems += _find_overlap(scans, scans_of_set)
    return scans, problems


def _refuse_shared_file(
    files: Sequence[TokenFile], valid_files: Sequence[TokenFile]
) -> None:
    """Refuse a file that is training and validation data; every document of it would be reported."""
    training = {os.path.realpath(file.path) for file in files}
    for file in valid_files:
        if os.path.realpath(file.path) in training:
            raise UserError(
                "the file is in PATH and in --valid",
                where=str(file.path),
                expected="training and validation data in separate folders",
                fix="name the folder of the training data alone as PATH",
                code="EVO-DATA-024",
            )


def _find_other_tokenizer(
    files: Sequence[TokenFile], tokenizer: Tokenizer | None
) -> list[str]:
    """Return a problem if another tokenizer made some of the files."""
    if tokenizer is None:
        return []
    paths = [file.path for file in files]
    warning = other_tokenizer_warning(paths, tokenizer.hash, str(tokenizer.path))
    return [] if warning is None else [warning]


def _find_short(name: str, scans: Sequence[FileScan], min_length: int) -> list[str]:
    """Return a problem if no document of a set is long enough."""
    if any(scan.refused[BROKEN] for scan in scans):
        return []
    lengths = np.concatenate([scan.lengths for scan in scans])
    if not len(lengths) or int(lengths.max()) >= min_length:
        return []
    return [
        f"{name}: none of {len(lengths):,} documents has the minimum length of {min_length} tokens, "
        f"the longest has {int(lengths.max()):,}"
    ]


def _find_short_files(
    path: str, scans: Sequence[FileScan], min_length: int
) -> list[str]:
    """Return a problem for the set, or for each of its files, without a document that is long enough."""
    of_set = _find_short(path, scans, min_length)
    if of_set:
        return of_set
    problems = []
    for scan in scans:
        problems += _find_short(str(scan.path), [scan], min_length)
    return problems


def _note_equal_files(scans: Sequence[FileScan]) -> None:
    """Note each file whose documents are, line by line, those of a file before it."""
    first_with: dict[bytes, Path] = {}
    for scan in scans:
        if not len(scan.hashes):
            continue
        content = scan.hashes.tobytes()
        original = first_with.setdefault(content, scan.path)
        if original != scan.path:
            scan.notes.append(
                f"{scan.path}: its {len(scan.hashes):,} documents are those of {original}, in the same order"
            )


def _parse_tokens(line: bytes) -> TokenArray:
    num_tokens = line.count(b",") + 1
    plain = parse_plain([line], np.array([num_tokens]))
    return np.array(parse_line(line), np.int64) if plain is None else plain


def _compare_meta(scan: FileScan) -> None:
    """Add a problem for each row of the meta that differs from its line."""
    try:
        rows = read_meta(scan.path)
    except UserError as error:
        scan.problems.append(str(error))
        return
    problems = scan.problems
    where = meta_path(scan.path)
    num_lines = len(scan.offsets)
    if len(rows) != num_lines:
        problems.append(
            f"{where}: {len(rows):,} rows, the token file has {num_lines:,} lines"
        )
    # [lines, 2]: where each line begins, and how many tokens it has. Rows that only one
    # side has are reported above.
    right = np.stack([scan.offsets, scan.lengths], axis=1)
    common = min(len(rows), num_lines)
    is_wrong = rows[:common] != right[:common]
    wrong = np.flatnonzero(is_wrong.any(axis=1))
    for row in wrong[:SHOWN]:
        stored = tuple(rows[row].tolist())
        expected = tuple(right[row].tolist())
        problems.append(f"{where} row {row}: {stored}, the line has {expected}")
    if len(wrong) > SHOWN:
        problems.append(f"{where}: {len(wrong) - SHOWN:,} more wrong rows")


def _find_repeats(scan: FileScan) -> None:
    """Find a block of lines right after an equal block: the file was appended twice. Other repeats are notes."""
    count = len(scan.hashes)
    if count < 2:
        return
    # Sorting brings equal lines together: shift is each line's distance to the previous
    # equal one, 0 without one.
    order = np.argsort(scan.hashes, kind="stable")
    sorted_hashes = scan.hashes[order]
    equals_previous = sorted_hashes[1:] == sorted_hashes[:-1]
    repeats = order[1:][equals_previous]
    if not len(repeats):
        return
    shift = np.zeros(count, np.int64)
    shift[repeats] = np.diff(order)[equals_previous]

    # A run of lines with the same shift repeats earlier lines in order.
    edges = np.flatnonzero(np.diff(shift)) + 1
    bounds = [0, *edges.tolist(), count]
    for low, high in pairwise(bounds):
        distance = int(shift[low])
        if distance and high - low >= max(distance, 2):
            original = f"{low - distance + 1} .. {high - distance}"
            scan.problems.append(
                f"{scan.path}: lines {low + 1} .. {high} repeat lines {original}: written twice in append mode?"
            )
            return
    subject = (
        "1 document repeats"
        if len(repeats) == 1
        else f"{len(repeats):,} documents repeat"
    )
    scan.notes.append(f"{scan.path}: {subject} an earlier one")


def _compare_fingerprint(scan: FileScan) -> None:
    record = read_fingerprint(scan.path)
    if record is None:
        return
    counts = {
        "documents": len(scan.offsets),
        "tokens": scan.tokens,
        "max_id": scan.max_id,
    }
    for key, value in counts.items():
        if key in record and record[key] != value:
            scan.problems.append(
                f"{scan.path}.json: {key} is {record[key]}, the token file has {value}"
            )


def _find_json_text(scan: FileScan, tokenizer: Tokenizer | None) -> list[str]:
    """Return a problem if samples read like JSON records: whole lines were tokenized instead of their text."""
    if tokenizer is None:
        return []
    samples = evenly_spaced(len(scan.offsets), LEAK_SAMPLES).tolist()
    leaks: dict[int, str] = {}  # line number -> start of its text
    with scan.path.open("rb") as file:
        for row in samples:
            offset = int(scan.offsets[row])
            file.seek(offset)
            tokens = _parse_tokens(file.readline())
            text = _decode_start(tokens, tokenizer)
            if text.startswith(('{"', "{ '", '[{"')) and '":' in text:
                leaks[row + 1] = text[:60]
    if len(leaks) < LEAK_SHARE * len(samples):
        return []
    line = min(leaks)
    return [
        f"{scan.path}: {len(leaks)} of {len(samples)} samples read like JSON records (line {line}: {leaks[line]!r}): "
        "whole lines were tokenized; use evomesh tokenize --text-field"
    ]


def _decode_start(tokens: TokenArray, tokenizer: Tokenizer) -> str:
    """Return the text of a document's first tokens, without a bos; ids that the tokenizer lacks are left out."""
    ids = np.abs(tokens[:LEAK_TOKENS])
    known = ids[ids < tokenizer.vocab_size]
    return tokenizer.decode(known.tolist()).lstrip("<s> \n")


def _find_overlap(train: Sequence[FileScan], valid: Sequence[FileScan]) -> list[str]:
    """Return a problem for each validation file with documents that are also in training."""
    known = np.unique(np.concatenate([scan.hashes for scan in train]))
    problems = []
    for scan in valid:
        shared = np.flatnonzero(np.isin(scan.hashes, known))
        if len(shared):
            problems.append(
                f"{scan.path}: {len(shared):,} of {len(scan.hashes):,} validation documents are also in training "
                f"(first: line {int(shared[0]) + 1})"
            )
    return problems
