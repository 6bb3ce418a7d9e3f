"""Write token files under hidden names, then rename them: a killed run leaves no partial file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from evomesh.config.user import expand_home
from evomesh.data.token_files.bin_dataset import BinDataset
from evomesh.data.token_files.fingerprint import fingerprint_path, read_fingerprint
from evomesh.data.token_files.lines import format_lines, largest_id
from evomesh.data.token_files.meta import meta_path, read_meta, write_meta
from evomesh.data.token_files.part_files import (
    open_part,
    remove_dead_parts,
    report_disk_errors,
)
from evomesh.errors import UserError
from evomesh.storage.new_folders import create_folder, remove_empty

COPY_BYTES = 1 << 22  # bytes of an existing file copied at once


class BinWriter:
    """Writer of ``X.bin``, ``X.bin.meta`` (int64) and ``X.bin.json``; they appear under these names at ``commit``.

    Args:
        path: the ``.bin`` to write; its folder is created, and removed again if nothing is committed.
        append: keep the documents of an existing file and add to them.

    Raises:
        UserError: the name does not end in .bin, or the existing file cannot be appended to.
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path = expand_home(path)
        if self.path.suffix != ".bin":
            raise UserError(
                f"{self.path.name!r} does not end in .bin",
                where="output",
                expected="DIR/TYPE/NAME.bin",
                code="EVO-CLI-006",
            )
        # 1. The folder, and in it the part, which is renamed at the end.
        try:
            self._new_folders = create_folder(self.path.parent)
        except OSError as error:
            raise UserError(
                f"cannot create the folder: {error}",
                where=str(self.path.parent),
                code="EVO-DATA-026",
            ) from None
        try:
            remove_dead_parts(self.path)
            self._part, self._file = open_part(self.path)
        except BaseException:
            remove_empty(self._new_folders)
            raise

        # 2. Counts of the documents written so far.
        self._lengths: list[NDArray[np.int64]] = []  # tokens of each line, in blocks
        self._sizes: list[NDArray[np.int64]] = []  # bytes of each line
        self._hash = xxhash.xxh3_128()
        self.documents = 0
        self.tokens = 0
        self.max_id = -1
        self.max_id_line = 0
        # Bytes of the texts, in UTF-8; None if they are not known of all documents.
        self.text_bytes: int | None = 0
        self.previous: dict[str, Any] = {}
        if append and self.path.exists():
            try:
                self._copy_existing()
            except BaseException:
                self.abort()
                raise

    def __enter__(self) -> BinWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()  # after commit there is nothing left to remove

    def write(
        self,
        documents: list[list[int]],
        *,
        masked: bool = False,
        text_bytes: int | None = None,
    ) -> None:
        """Append documents, each a list of ids; ``masked``: some ids are negative, inputs that are not targets.

        Args:
            text_bytes: bytes of the texts that all their ids stand for, if that is known.
        """
        if not documents:
            return
        if text_bytes is None or self.text_bytes is None:
            self.text_bytes = None
        else:
            self.text_bytes += text_bytes
        self._update_largest(documents, masked)
        lines = format_lines(documents)
        self._append(lines)
        sizes = _line_sizes(lines)
        self._sizes.append(sizes)
        counts = list(map(len, documents))
        lengths = np.array(counts)
        self._lengths.append(lengths)
        self.documents += len(documents)
        self.tokens += int(lengths.sum())

    def _append(self, content: bytes) -> None:
        """Write bytes to the part and include them in the hash."""
        self._hash.update(content)
        with report_disk_errors(self.path):
            self._file.write(content)

    def _update_largest(self, documents: list[list[int]], masked: bool) -> None:
        """Keep the largest id so far and the first line that has it."""
        # A masked token is stored as its id with a minus sign. Without one the largest
        # is the only extreme, which halves the time.
        largest = -1
        for tokens in documents:
            largest = max(largest, max(tokens, default=-1))
            if masked:
                largest = max(largest, -min(tokens, default=1))
        if largest <= self.max_id:
            return
        # This is rare after the first blocks, so the search for the line may be slow.
        self.max_id = largest
        for number, tokens in enumerate(documents, self.documents + 1):
            if largest in tokens or -largest in tokens:
                self.max_id_line = number
                return

    def commit(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Finish the three files and rename them into place; return the fingerprint: ``facts`` and the counts."""
        if not self.documents:
            raise UserError(
                "the input has no documents",
                where=str(self.path),
                expected="at least one",
                fix="check the input: empty lines, an empty list or a header alone are not documents",
                code="EVO-DATA-007",
            )
        lengths = np.concatenate(self._lengths)
        sizes = np.concatenate(self._sizes)
        record = facts | {
            "documents": self.documents,
            "tokens": self.tokens,
            "max_id": self.max_id,
            "max_id_line": self.max_id_line,
            **({} if self.text_bytes is None else {"text_bytes": self.text_bytes}),
            "bin_hash": f"xxh3_128:{self._hash.hexdigest()}",
        }
        # 1. Write all three files completely, under hidden names.
        meta = Path(f"{self._part}.meta")
        fingerprint = Path(f"{self._part}.json")
        with report_disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            write_meta(meta, np.cumsum(sizes) - sizes, lengths)
            fingerprint.write_bytes(
                orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n"
            )
        # 2. Rename them. Until the last rename the file has no meta, so that a reader refuses it; after a crash here, a
        # rerun repairs it.
        meta_path(self.path).unlink(missing_ok=True)
        os.replace(self._part, self.path)
        os.replace(fingerprint, fingerprint_path(self.path))
        os.replace(meta, meta_path(self.path))
        self._file.close()  # not earlier: an unlocked part counts as left by a killed run
        return record

    def abort(self) -> None:
        """Remove what was not committed."""
        with suppress(OSError):  # a full disk fails again at close
            self._file.close()
        for suffix in ("", ".meta", ".json"):
            Path(f"{self._part}{suffix}").unlink(missing_ok=True)
        # A folder with something in it stays: the output after commit, or another file.
        remove_empty(self._new_folders)

    def _copy_existing(self) -> None:
        """Copy the existing file into the part, with its counts."""
        rows = read_meta(self.path)
        self.previous = read_fingerprint(self.path) or {}
        last_block = b""
        with self.path.open("rb") as source:
            while block := source.read(COPY_BYTES):
                self._append(block)
                last_block = block
        # Files of other tools may lack the last newline.
        if not last_block.endswith(b"\n"):
            self._append(b"\n")
        # A line ends where the next one starts, the last one at the end of the file.
        offsets = rows[:, 0].astype(np.int64)
        lengths = rows[:, 1].astype(np.int64)
        sizes = np.diff(offsets, append=self._file.tell())
        self._sizes.append(sizes)
        self._lengths.append(lengths)
        self.documents = len(rows)
        self.tokens = int(lengths.sum())
        known = self.previous
        self.text_bytes = known.get("text_bytes")
        if "max_id" in known:
            self.max_id = int(known["max_id"])
            self.max_id_line = int(known["max_id_line"])
        else:
            self._read_largest()

    def _read_largest(self) -> None:
        """Find the largest id in a file of another tool, which left no fingerprint."""
        existing = BinDataset(self.path)
        for number in range(existing.blocks):
            documents = existing.documents_of_block(number)
            tokens = np.abs(existing.read(documents))
            largest = largest_id(tokens)
            if largest <= self.max_id or not len(tokens):
                continue
            self.max_id = largest
            # The document that holds the id is the first that ends after it.
            position = tokens.argmax()
            lengths = existing.lengths[documents]
            ends = np.cumsum(lengths)
            index = np.searchsorted(ends, position, side="right")
            self.max_id_line = int(documents[index]) + 1


def _line_sizes(lines: bytes) -> NDArray[np.int64]:
    """Return the bytes of each line, its newline included."""
    # The distance from the newline before: newlines at the bytes 9 and 14 end lines of
    # 10 and 5 bytes.
    characters = np.frombuffer(lines, np.uint8)
    newlines = np.flatnonzero(characters == ord("\n"))
    return np.diff(newlines, prepend=-1)
