"""The index of a checkpoint: which pieces each tensor consists of, parsed as far as somebody needs it.

That of a 70B on 512 ranks lists 650,000 pieces in 41 MB. Decoding its lines takes half a
second, making records of all pieces ten times that, so a rank makes those that it needs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from evomesh.checkpoint.native.format import (
    COMMIT,
    CheckpointError,
    CommitRecord,
    TensorRecord,
)


class TensorIndex:
    """The lines of an index, whose hash has been checked.

    Args:
        data: one line of JSON for each tensor.
        commit: the record that names the data files and counts the tensors.
        folder: of the checkpoint, for messages.
    """

    def __init__(self, data: bytes, commit: CommitRecord, folder: str) -> None:
        self._lines = data.splitlines()
        self._files = commit.files
        self._num_tensors = commit.tensors
        self._folder = folder

    def names(self) -> list[str]:
        """Return the names of all tensors.

        Raises:
            CheckpointError: a line that is not JSON, a tensor that is listed twice, or
                another number of tensors than the commit record counts.
        """
        names: dict[str, None] = {}
        for line in self._lines:
            name = self._name_in(line)
            if name in names:
                raise self._error(f"the index lists {name!r} twice")
            names[name] = None
        if len(names) != self._num_tensors:
            raise self._error(
                f"the index lists {len(names)} tensors, but {COMMIT} counts {self._num_tensors}"
            )
        return list(names)

    def records(self, wanted: Collection[str] | None = None) -> dict[str, TensorRecord]:
        """Return the records of the tensors of these names, or of all; names that are not listed are left out.

        Raises:
            CheckpointError: a line that does not fit its data files; for all of them, as ``names`` too.
        """
        if wanted is None:
            self.names()
        records = {}
        for line in self._lines:
            if wanted is None or self._name_in(line) in wanted:
                record = self._checked(line)
                records[record.name] = record
        return records

    def check(self, share: int = 0, shares: int = 1) -> None:
        """Check the names of all lines, and every piece of this share of the lines.

        Raises:
            CheckpointError: as ``names`` and ``records``.
        """
        self.names()
        for line in self._lines[share::shares]:
            self._checked(line)

    def records_of_files(self, share: int, shares: int) -> Iterator[TensorRecord]:
        """Yield the tensors with bytes in the data files of a share, with those pieces only.

        Rank 1 of 8 gets the pieces of files 1, 9, 17 and so on. ``check`` comes first, on
        all ranks: here the pieces are not compared with their tensor again.
        """
        for line in self._lines:
            value = json.loads(line)
            in_share = []
            for piece in value["pieces"]:
                file_number = piece[0]
                if file_number % shares == share:
                    in_share.append(piece)
            if in_share:
                yield TensorRecord.from_json(value | {"pieces": in_share})

    def _name_in(self, line: bytes) -> str:
        try:
            value: Any = json.loads(line)
            return str(value["name"])
        except (ValueError, KeyError, TypeError, RecursionError):
            # It cannot be parsed, and says how.
            return self._checked(line).name

    def _checked(self, line: bytes) -> TensorRecord:
        try:
            return TensorRecord.from_line(line, self._files)
        except CheckpointError as error:
            raise self._error(error.found) from None

    def _error(self, found: str) -> CheckpointError:
        return CheckpointError(found, where=self._folder, code="EVO-CKPT-002")
