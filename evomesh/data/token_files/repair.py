"""Rebuild the meta of a token file from its lines."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from evomesh.data.token_files.file_check import check_file
from evomesh.data.token_files.folders import find_bins
from evomesh.data.token_files.lines import BadLineError, parse_line
from evomesh.data.token_files.meta import meta_path, write_meta
from evomesh.data.token_files.part_files import open_part, remove_dead_parts
from evomesh.errors import UserError
from evomesh.quantities import counted


def repair(path: Path) -> str:
    """Write a new int64 meta for one file; move a torn last line to ``X.bin.torn``.

    Raises:
        UserError: a line before the last is broken (which one, and why).
    """
    # 1. Read every line; a last one without a newline may be torn.
    size = check_file(path)
    lengths: list[int] = []
    starts: list[int] = []
    position = 0
    torn = b""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                tokens = parse_line(line)
            except BadLineError as bad:
                if position + len(line) == size and not line.endswith(b"\n"):
                    torn = line
                    break
                raise UserError(
                    bad.found,
                    where=bad.location(path, number, position),
                    expected=bad.expected,
                    fix="a broken line cannot be repaired: tokenize the source again, or delete this line",
                    code="EVO-DATA-005",
                ) from None
            lengths.append(len(tokens))
            starts.append(position)
            position += len(line)
    if not lengths:
        raise UserError(
            "the file has no complete line",
            where=str(path),
            fix="tokenize the source again",
            code="EVO-DATA-007",
        )

    # 2. Move the torn line, then write the meta of the others.
    if torn:
        path.with_name(path.name + ".torn").write_bytes(torn)
        os.truncate(path, size - len(torn))
    remove_dead_parts(meta_path(path))
    part, locked = open_part(meta_path(path))
    with locked:
        write_meta(part, np.array(starts, np.int64), np.array(lengths, np.int64))
        os.replace(part, meta_path(path))
    moved = (
        f"; the torn last line ({counted(len(torn), 'byte', '')}) was moved to {path.name}.torn"
        if torn
        else ""
    )
    return f"{path}: {counted(len(lengths), 'document')}, {counted(sum(lengths), 'token')}{moved}"


def repair_path(path: str) -> list[str]:
    """Repair one file, or each below a folder; return one message per file."""
    return [repair(file.path) for file in find_bins(path)]
