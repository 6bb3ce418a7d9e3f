"""Writing token files so that a killed run leaves nothing half-made: beside the target, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
import xxhash

from evomesh.data.token_files.bin_dataset import BinDataset
from evomesh.data.token_files.fingerprint import fingerprint_path, read_fingerprint
from evomesh.data.token_files.lines import format_lines
from evomesh.data.token_files.meta import meta_path, read_meta, write_meta
from evomesh.data.token_files.part_files import open_part, remove_dead_parts
from evomesh.errors import UserError

COPIED = 1 << 22  # bytes of an existing file at once


class BinWriter:
    """Writes ``X.bin``, ``X.bin.meta`` (int64) and ``X.bin.json``; nothing is seen under these names before ``commit``.

    Args:
        path: the ``.bin`` to make; its folder is created.
        append: begin with what is already there.

    Raises:
        UserError: the name does not end in .bin, or what is there cannot be appended to.
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path = Path(path).expanduser()
        if self.path.suffix != ".bin":
            raise UserError(
                f"{self.path.name!r} does not end in .bin", where="output", expected="DIR/TYPE/NAME.bin"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the folder: {error}", where=str(self.path.parent)) from None
        remove_dead_parts(self.path)
        self._part, self._file = open_part(self.path)
        self._lengths: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._sizes: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._hash = xxhash.xxh3_128()
        self.documents = self.tokens = self.targets = 0
        self.max_id, self.max_id_line = -1, 0
        self.previous: dict[str, Any] = {}
        if append and self.path.exists():
            try:
                self._begin_with_existing()
            except BaseException:
                self.abort()
                raise

    def __enter__(self) -> BinWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()  # after commit there is nothing left to remove

    def write(self, documents: list[list[int]], *, masked: bool = False) -> None:
        """Append documents, each a list of ids; ``masked``: some are negative, inputs that are no targets."""
        if not documents:
            return
        self._find_largest(documents, masked)
        blob = format_lines(documents)
        newlines = np.flatnonzero(np.frombuffer(blob, np.uint8) == ord("\n"))
        self._lengths.append(np.array([len(tokens) for tokens in documents], np.int64))
        self._sizes.append(np.diff(newlines, prepend=-1))
        self._hash.update(blob)
        with _disk(self.path):
            self._file.write(blob)
        self.documents += len(documents)
        self.tokens += sum(map(len, documents))

    def _find_largest(self, documents: list[list[int]], masked: bool) -> None:
        largest = max(max(tokens, default=-1) for tokens in documents)
        if masked:
            largest = max(largest, -min(min(tokens, default=1) for tokens in documents))
        if largest > self.max_id:
            self.max_id = largest
            for number, tokens in enumerate(documents, self.documents + 1):
                if largest in tokens or -largest in tokens:
                    self.max_id_line = number
                    return

    def commit(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Finish the three files and give them their names; returns the fingerprint: ``facts`` and the counts."""
        if not self.documents:
            raise UserError("the input holds no document", where=str(self.path))
        lengths, sizes = np.concatenate(self._lengths), np.concatenate(self._sizes)
        record = facts | {
            "documents": self.documents,
            "tokens": self.tokens,
            "max_id": self.max_id,
            "max_id_line": self.max_id_line,
            "bin_hash": f"xxh3_128:{self._hash.hexdigest()}",
        }
        meta, fingerprint = Path(f"{self._part}.meta"), Path(f"{self._part}.json")
        with _disk(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            write_meta(meta, np.cumsum(sizes) - sizes, lengths)
            fingerprint.write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")
        # A reader between two of these renames finds an old meta with a new file, which it refuses; a crash there is
        # repaired by a rerun.
        meta_path(self.path).unlink(missing_ok=True)
        os.replace(self._part, self.path)
        os.replace(fingerprint, fingerprint_path(self.path))
        os.replace(meta, meta_path(self.path))
        self._file.close()  # not before: a part that nobody holds is taken for a dead run's
        return record

    def abort(self) -> None:
        """Remove what was not committed."""
        with suppress(OSError):  # a full disk says so again when it closes
            self._file.close()
        for suffix in ("", ".meta", ".json"):
            Path(f"{self._part}{suffix}").unlink(missing_ok=True)

    def _begin_with_existing(self) -> None:
        rows = read_meta(self.path)
        self.previous = read_fingerprint(self.path) or {}
        last = b""
        with self.path.open("rb") as source:
            while block := source.read(COPIED):
                self._hash.update(block)
                with _disk(self.path):
                    self._file.write(block)
                last = block[-1:]
        if last != b"\n":
            self._hash.update(b"\n")
            self._file.write(b"\n")
        offsets, size = rows[:, 0].astype(np.int64), self._file.tell()
        self._sizes.append(np.diff(offsets, append=size))
        self._lengths.append(rows[:, 1].astype(np.int64))
        self.documents, self.tokens = len(rows), int(self._lengths[0].sum())
        if "max_id" in self.previous:
            self.max_id, self.max_id_line = int(self.previous["max_id"]), int(self.previous["max_id_line"])
        else:
            self._read_largest()

    def _read_largest(self) -> None:
        """The largest id of a file of another tool, which left no fingerprint."""
        existing = BinDataset(self.path)
        ends = np.cumsum(self._lengths[0])
        for start in range(0, len(existing), existing.block):
            tokens = np.abs(existing.read(np.arange(start, min(start + existing.block, len(existing)))))
            if len(tokens) and int(tokens.max()) > self.max_id:
                place = int(ends[start] - self._lengths[0][start]) + int(tokens.argmax())
                self.max_id = int(tokens.max())
                self.max_id_line = int(np.searchsorted(ends, place, side="right")) + 1


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns what a disk refuses into a message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write: {error.strerror}", where=str(path), fix="free room there, or write elsewhere"
        ) from None
