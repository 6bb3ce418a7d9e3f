"""The bytes of a checkpoint: format ``evomesh-checkpoint`` version 1.

    {root}/step-00000040/
        3f9c21ab-r00000.safetensors     boxes that rank 0 owns
        3f9c21ab-index.jsonl            one line per global tensor: shape, dtype, pieces with their hashes
        commit.json                     written last; without it the folder is not a checkpoint

docs/checkpoints.md describes every field; this module is the only one that knows them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from evomesh.checkpoint.native.boxes import Box, Coordinates, covers_once
from evomesh.errors import UserError

FORMAT, VERSION = "evomesh-checkpoint", 1
PIECE_HASH, RECORD_HASH = "xxh3_128", "sha256"
PIECE_BYTES = 4 << 20  # hash unit and read unit
COMMIT = "commit.json"
FOLDER = re.compile(r"^step-(\d{8,})(?:-([0-9a-f]{8}))?$")
FILE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # a plain name: no folder, nothing hidden, no ".."
ALIGNMENT = 64
MAX_INDEX_LINE = 64 << 20

DTYPES: dict[str, torch.dtype] = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(UserError):
    """A checkpoint cannot be used: says which file or tensor, and why."""


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces; the same value always gives the same bytes. NaN and infinity are refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def piece_hash(data: memoryview | bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class PieceRecord:
    """A hashed run of bytes: box ``box`` of a tensor, at byte ``start`` of data file number ``file``."""

    file: int
    box: Box
    start: int
    digest: str


@dataclass(frozen=True)
class TensorRecord:
    """One line of the index."""

    name: str
    dtype: str
    shape: Coordinates
    pieces: tuple[PieceRecord, ...]

    @property
    def item_size(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def described(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    def to_line(self) -> bytes:
        pieces = [[p.file, list(p.box.offsets), list(p.box.shape), p.start, p.digest] for p in self.pieces]
        return (
            canonical({"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "pieces": pieces})
            + b"\n"
        )

    @staticmethod
    def from_line(line: bytes, files: list[tuple[str, int]]) -> TensorRecord:
        """Parses one line and checks that each piece lies inside its tensor and its file.

        Raises:
            CheckpointError: naming the tensor and the field.
        """
        try:
            entry = json.loads(line)
            name, dtype, shape = entry["name"], entry["dtype"], tuple(entry["shape"])
            pieces = tuple(PieceRecord(f, Box(tuple(o), tuple(s)), b, h) for f, o, s, b, h in entry["pieces"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"an index line is not a tensor record: {line[:80]!r} ({error})") from None
        if dtype not in DTYPES:
            raise CheckpointError(f"{name}: unknown dtype {dtype!r}")
        record = TensorRecord(name, dtype, shape, pieces)
        for piece in pieces:
            _check_piece(record, piece, files)
        if not covers_once(record.shape, [piece.box for piece in pieces]):
            raise CheckpointError(
                f"{name}: its {len(pieces)} pieces do not cover {record.described} exactly once"
            )
        return record


def _check_piece(record: TensorRecord, piece: PieceRecord, files: list[tuple[str, int]]) -> None:
    box = piece.box
    numbers = [piece.file, piece.start, *box.offsets, *box.shape, *record.shape]
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or not len(box.offsets) == len(
        box.shape
    ) == len(record.shape):
        raise CheckpointError(f"{record.name}: a piece has an impossible place {piece}")
    if any(o + n > size for o, n, size in zip(box.offsets, box.shape, record.shape, strict=True)):
        raise CheckpointError(
            f"{record.name}: the piece at {list(box.offsets)} reaches outside {record.described}"
        )
    if piece.file >= len(files):
        raise CheckpointError(
            f"{record.name}: file number {piece.file}, but the commit names {len(files)} files"
        )
    name, size = files[piece.file]
    end = piece.start + box.numel * record.item_size
    if end > size:
        raise CheckpointError(f"{record.name}: bytes {piece.start}..{end} of {name}, which has {size}")


def file_name(attempt: str, rank: int) -> str:
    return f"{attempt}-r{rank:05d}.safetensors"


def index_name(attempt: str) -> str:
    return f"{attempt}-index.jsonl"


def folder_name(step: int, attempt: str = "") -> str:
    """``step-00000040``; with the attempt behind when a folder of that step is already committed."""
    return f"step-{step:08d}" + (f"-{attempt}" if attempt else "")


def safetensors_header(entries: list[tuple[str, str, Coordinates, int]]) -> bytes:
    """Length and header of a safetensors file, padded so that the data begins at a multiple of 64 bytes.

    Args:
        entries: (key, dtype name, shape, bytes) in the order of the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, dtype, shape, size in entries:
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def entry_key(name: str, shape: Coordinates, box: Box) -> str:
    """The tensor's own name for a whole tensor, else with the offsets of the box behind an @."""
    return name if box.shape == shape else f"{name}@{','.join(map(str, box.offsets))}"


def seal(body: dict[str, Any]) -> bytes:
    """The content of ``commit.json``: the body and the hash of its canonical form."""
    return canonical({"body": body, "sha256": sha256(canonical(body))})


def unseal(data: bytes) -> dict[str, Any]:
    """The body of a commit record.

    Raises:
        CheckpointError: damaged, of another format, or of a newer version.
    """
    try:
        record = json.loads(data)
        body, digest = record["body"], record["sha256"]
        good = sha256(canonical(body)) == digest
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{COMMIT} is not a commit record ({type(error).__name__}: {error})") from None
    if not good:
        raise CheckpointError(f"{COMMIT} does not match its own hash")
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{COMMIT} is not of format {FORMAT}")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{COMMIT} has format version {body.get('version')}, this evomesh reads version {VERSION}: "
            f"it was written by evomesh {body.get('software', {}).get('evomesh')}"
        )
    for name, *_ in [*body["files"], [body["index"]["file"]]]:
        if not FILE_NAME.match(name):
            raise CheckpointError(f"{COMMIT} names the file {name!r}, which is not a plain file name")
    return body


def iter_records(index: bytes, files: list[tuple[str, int]]) -> Iterator[TensorRecord]:
    """The tensor records of an index, line by line."""
    for line in index.splitlines():
        yield TensorRecord.from_line(line, files)
