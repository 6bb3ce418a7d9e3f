"""The bytes of a checkpoint: format ``evomesh-checkpoint`` version 1.

    {root}/step-00000040/
        3f9c21ab-r00000.safetensors     boxes that rank 0 owns
        3f9c21ab-index.jsonl            one line per global tensor: shape, dtype, pieces with their hashes
        commit.json                     written last; without it the folder is not a checkpoint
        3f9c21ab-unfinished             empty; there until commit.json is

docs/checkpoints.md describes every field; only this module knows how they are written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from evomesh.checkpoint.native.boxes import Box, Coordinates, covers_once
from evomesh.checkpoint.native.fields import (
    array,
    flag,
    integer,
    integers,
    mapping,
    text,
)
from evomesh.errors import UserError

FORMAT, VERSION = "evomesh-checkpoint", 1
PIECE_HASH, RECORD_HASH = "xxh3_128", "sha256"
PIECE_BYTES = 4 << 20  # hash unit and read unit
COMMIT = "commit.json"
FOLDER = re.compile(r"step-([0-9]{8,18})(?:-([0-9a-f]{8}))?\Z")
# A plain name: no folder, nothing hidden, no "..".
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
# Every name that a save gives in a step folder.
SAVED_NAME = re.compile(
    r"(?:[0-9a-f]{8}-(?:r[0-9]{5,}\.safetensors|index\.jsonl|unfinished)"
    r"|commit\.json|\.commit\.json\.[0-9a-f]{8})\Z"
)
MAX_DIMS = 32
MAX_COMMIT_BYTES = 64 << 20  # of a commit record
MAX_HEADER_BYTES = 100_000_000  # of a data file, as in the safetensors library
LAYOUT_AXES = ("tp", "wp", "pp", "dp", "zero")

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
    """A checkpoint that cannot be used; the message names the file or tensor and the reason."""


def _damaged(found: str) -> CheckpointError:
    return CheckpointError(found, code="EVO-CKPT-002")


def canonical(value: Any) -> bytes:
    """Return JSON with sorted keys and no spaces, so that equal values give equal bytes.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    return json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    ).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def piece_hash(data: memoryview | bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class FileRecord:
    """A data file of a checkpoint: its name, its size in bytes and the hash of its safetensors header."""

    name: str
    size: int
    header_digest: str

    def to_json(self) -> list[Any]:
        return [self.name, self.size, self.header_digest]

    @staticmethod
    def from_json(value: list[Any]) -> FileRecord:
        name, size, digest = array(value, "files")
        return FileRecord(
            _checked_name(name), integer(size, "file size"), text(digest, "header hash")
        )


@dataclass(frozen=True)
class IndexRecord:
    """The index of a checkpoint: its file, size in bytes and hash."""

    file: str
    size: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "bytes": self.size, "sha256": self.sha256}

    @staticmethod
    def from_json(value: dict[str, Any]) -> IndexRecord:
        fields = mapping(value, "index")
        size = integer(fields["bytes"], "index.bytes")
        return IndexRecord(
            _checked_name(fields["file"]), size, text(fields["sha256"], "index.sha256")
        )


@dataclass(frozen=True)
class ParentRecord:
    """The checkpoint that a run continued from."""

    step: int
    attempt: str

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "attempt": self.attempt}

    @staticmethod
    def from_json(value: dict[str, Any]) -> ParentRecord:
        fields = mapping(value, "parent")
        return ParentRecord(
            integer(fields["step"], "parent.step"),
            text(fields["attempt"], "parent.attempt"),
        )


@dataclass(frozen=True)
class CommitRecord:
    """The content of ``commit.json``: what a checkpoint is, and which files it consists of.

    A save begins with a record without files (``commit.new_record``) and completes it
    once they are written.

    Attributes:
        attempt: random name of the try at saving that succeeded; the names of its files begin with it.
        created: UTC time, ``2026-01-31T12:00:00Z``.
        config: resolved config without secrets, as strict JSON (``encode_json``).
        state: everything that is neither tensor nor config, as strict JSON (``encode_json``).
        layout: ``world`` (number of processes) and the sizes of ``LAYOUT_AXES``; for information only.
        parent: None for a run that started from scratch.
        software: versions of the code that wrote it.
        tensors: number of tensors.
        tensor_bytes: size of all tensors together, without headers.
    """

    step: int
    attempt: str
    created: str
    config: dict[str, Any]
    state: dict[str, Any]
    layout: dict[str, int]
    parent: ParentRecord | None = None
    snapshot: bool = False
    software: dict[str, Any] = field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    index: IndexRecord = IndexRecord("", 0, "")
    tensors: int = 0
    tensor_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the body of ``commit.json``."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "attempt": self.attempt,
            "created": self.created,
            "hash": {"piece": PIECE_HASH, "record": RECORD_HASH},
            "config": self.config,
            "config_sha256": sha256(canonical(self.config)),
            "state": self.state,
            "layout": self.layout,
            "parent": None if self.parent is None else self.parent.to_json(),
            "snapshot": self.snapshot,
            "software": self.software,
            "files": [file.to_json() for file in self.files],
            "index": self.index.to_json(),
            "tensors": self.tensors,
            "tensor_bytes": self.tensor_bytes,
        }

    @staticmethod
    def from_json(body: dict[str, Any]) -> CommitRecord:
        """Parse the body of ``commit.json``.

        Raises:
            CheckpointError: a field is missing or of the wrong kind, or a file name leaves the folder.
        """
        try:
            return CommitRecord._from_fields(body)
        except (KeyError, TypeError, ValueError) as error:
            kind = type(error).__name__
            raise _damaged(f"{COMMIT} has a bad field ({kind}: {error})") from None

    @staticmethod
    def _from_fields(body: dict[str, Any]) -> CommitRecord:
        def count(key: str) -> int:
            return integer(body[key], key)

        def word(key: str) -> str:
            return text(body[key], key)

        def section(key: str) -> dict[str, Any]:
            return mapping(body[key], key)

        # What older checkpoints lack has the value that it meant then.
        layout = {}
        sizes = mapping(body.get("layout", {}), "layout")
        for axis, size in sizes.items():
            layout[text(axis, "layout")] = integer(size, f"layout.{axis}")
        parent = None
        if body.get("parent") is not None:
            parent = ParentRecord.from_json(body["parent"])
        files = []
        for file in array(body["files"], "files"):
            files.append(FileRecord.from_json(file))
        is_snapshot = body.get("snapshot", False)
        versions = body.get("software", {})
        return CommitRecord(
            step=count("step"),
            attempt=word("attempt"),
            created=word("created"),
            config=section("config"),
            state=section("state"),
            layout=layout,
            parent=parent,
            snapshot=flag(is_snapshot, "snapshot"),
            software=mapping(versions, "software"),
            files=tuple(files),
            index=IndexRecord.from_json(body["index"]),
            tensors=count("tensors"),
            tensor_bytes=count("tensor_bytes"),
        )

    def to_bytes(self) -> bytes:
        """Return the content of ``commit.json``: the body and the hash of its canonical form."""
        data = seal(self.to_json())
        if len(data) > MAX_COMMIT_BYTES:
            raise _damaged(
                f"{COMMIT} would have {len(data)} bytes, at most {MAX_COMMIT_BYTES} are read"
            )
        return data

    @staticmethod
    def from_bytes(data: bytes) -> CommitRecord:
        """Parse and verify the content of ``commit.json``.

        Raises:
            CheckpointError: damaged, of another format, or of a newer version.
        """
        return CommitRecord.from_json(_unseal(data))


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not FILE_NAME.match(name):
        raise _damaged(f"{COMMIT} names the file {name!r}: not a plain file name")
    return name


def seal(body: dict[str, Any]) -> bytes:
    """Return a body and the hash of its canonical form as the content of ``commit.json``."""
    return canonical({"body": body, "sha256": sha256(canonical(body))})


def _unseal(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
        body = content["body"]
        # The hash is that of the parsed value in canonical form, not of the file's bytes:
        # a record that an editor has indented anew is still intact.
        intact = sha256(canonical(body)) == content["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(
            f"{COMMIT} is not a commit record ({type(error).__name__}: {error})"
        ) from None
    if not intact:
        raise _damaged(f"{COMMIT} does not match its own hash")
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _damaged(f"{COMMIT} is not of format {FORMAT}")
    version = body.get("version")
    if type(version) is not int or version != VERSION:
        software = body.get("software")
        writer: Any = "of an unknown version"
        if isinstance(software, dict):
            writer = software.get("evomesh")
        raise CheckpointError(
            f"{COMMIT} has format version {str(version)[:20]}, but this evomesh reads version {VERSION}; "
            f"it was written by evomesh {str(writer)[:40]}",
            code="EVO-CKPT-006",
        )
    return body


def layout_record(world: int, **sizes: int) -> dict[str, int]:
    """Return the ``layout`` of a commit record for ``world`` processes; axes that are not named have size 1."""
    return {"world": world} | {axis: sizes.get(axis, 1) for axis in LAYOUT_AXES}


# Two ranks shard the columns of w2, bfloat16 [16, 43]. Its line of the index has a piece
# of each, and says nothing of ranks or layouts:
#
#     number of the data file, offsets, shape, first byte, hash
#     [0, [0, 0],  [16, 22], 46720, "abde..."]     columns 0 to 21
#     [1, [0, 22], [16, 21], 46720, "07c1..."]     columns 22 to 42
#
# Any other layout reads it by overlap: a rank that wants rows 0 to 7 needs both pieces,
# one that wants columns 30 to 42 the second only.


@dataclass(frozen=True)
class PieceRecord:
    """A hashed run of bytes: a box of a tensor, at byte ``start`` of data file number ``file``."""

    file: int
    box: Box
    start: int
    digest: str

    def to_json(self) -> list[Any]:
        return [
            self.file,
            list(self.box.offsets),
            list(self.box.shape),
            self.start,
            self.digest,
        ]

    @staticmethod
    def from_json(value: list[Any]) -> PieceRecord:
        file, offsets, shape, start, digest = array(value, "piece")
        box = Box(integers(offsets, "offsets"), integers(shape, "shape"))
        return PieceRecord(
            integer(file, "file number"),
            box,
            integer(start, "start"),
            text(digest, "piece hash"),
        )


@dataclass(frozen=True)
class TensorRecord:
    """One line of the index: a global tensor and the pieces that its bytes are stored in."""

    name: str
    dtype: str
    shape: Coordinates
    pieces: tuple[PieceRecord, ...]

    @property
    def item_size(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def described(self) -> str:
        """Dtype and shape for messages: ``BF16[16,43]``."""
        return describe_type(self.dtype, self.shape)

    def to_line(self) -> bytes:
        """Return the line of the index, newline included."""
        line = {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "pieces": [piece.to_json() for piece in self.pieces],
        }
        return canonical(line) + b"\n"

    @staticmethod
    def from_json(value: Any) -> TensorRecord:
        """Parse the JSON of one line; its pieces are not compared with the tensor.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or of the wrong kind.
        """
        fields = mapping(value, "the line")
        pieces = []
        for piece in array(fields["pieces"], "pieces"):
            pieces.append(PieceRecord.from_json(piece))
        return TensorRecord(
            text(fields["name"], "name"),
            text(fields["dtype"], "dtype"),
            integers(fields["shape"], "shape"),
            tuple(pieces),
        )

    @staticmethod
    def from_line(line: bytes, files: Sequence[FileRecord]) -> TensorRecord:
        """Parse one line and check that each piece is inside its tensor and its file.

        Raises:
            CheckpointError: naming the tensor and the field.
        """
        try:
            record = TensorRecord.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise _damaged(
                f"an index line is not a tensor record: {line[:80]!r} ({reason})"
            ) from None
        if len(record.shape) > MAX_DIMS:
            raise _damaged(
                f"{record.name}: {len(record.shape)} dims, at most {MAX_DIMS} are possible"
            )
        if record.dtype not in DTYPES:
            raise _damaged(f"{record.name}: unknown dtype {record.dtype!r}")
        # The hash proves that this index was written, not that it makes sense. A piece
        # out of bounds would read bytes of another tensor, and a hole would leave what
        # the allocator had there in a weight: both are refused before any data is read.
        for piece in record.pieces:
            _check_piece(record, piece, files)
        boxes = [piece.box for piece in record.pieces]
        if not covers_once(record.shape, boxes):
            raise _damaged(
                f"{record.name}: its {len(boxes)} pieces do not cover {record.described} exactly once"
            )
        return record


def describe_type(dtype: str, shape: Sequence[int]) -> str:
    """Return ``BF16[16,43]``."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def _check_piece(
    record: TensorRecord, piece: PieceRecord, files: Sequence[FileRecord]
) -> None:
    box = piece.box
    if not len(box.offsets) == len(box.shape) == len(record.shape):
        raise _damaged(f"{record.name}: a piece has impossible coordinates: {piece}")
    if any(end > length for end, length in zip(box.ends, record.shape, strict=True)):
        raise _damaged(
            f"{record.name}: the piece at {list(box.offsets)} reaches outside {record.described}"
        )
    if piece.file >= len(files):
        raise _damaged(
            f"{record.name}: file number {piece.file}, but the commit record names {len(files)} files"
        )
    size = box.numel * record.item_size
    if size > PIECE_BYTES:
        raise _damaged(
            f"{record.name}: a piece of {size} bytes, at most {PIECE_BYTES} are possible"
        )
    file = files[piece.file]
    end = piece.start + size
    if end > file.size:
        raise _damaged(
            f"{record.name}: a piece at bytes {piece.start}..{end} of {file.name}, which has {file.size} bytes"
        )


def file_name(attempt: str, rank: int) -> str:
    """Return the name of a rank's data file."""
    return f"{attempt}-r{rank:05d}.safetensors"


def index_name(attempt: str) -> str:
    """Return the name of the index."""
    return f"{attempt}-index.jsonl"


def foreign_names(names: Iterable[str]) -> list[str]:
    """Return those names in a step folder that no save gives: they are somebody else's files or folders."""
    return [name for name in names if not SAVED_NAME.match(name)]


def folder_name(step: int, attempt: str = "") -> str:
    """Return ``step-00000040``, or ``step-00000040-ATTEMPT`` where that step is already committed."""
    return f"step-{step:08d}" + (f"-{attempt}" if attempt else "")
