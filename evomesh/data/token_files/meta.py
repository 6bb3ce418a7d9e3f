"""The index beside a token file: ``X.bin.meta``, an .npy array of rows (byte offset of the line, tokens in it)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomesh.data.token_files.mapping import map_array, read_array_header
from evomesh.errors import UserError
from evomesh.quantities import counted

CHECK_ROWS = 1 << 20  # rows checked at once: bounds memory
# Smaller metas are read, not mapped, so that a tree of many small files does not keep a
# handle for each.
MAP_BYTES = 1 << 20

MetaArray = NDArray[np.int32] | NDArray[np.int64]


def meta_path(bin_path: str | Path) -> Path:
    """Return the path of a token file's meta."""
    return Path(f"{bin_path}.meta")


def rebuild(bin_path: str | Path) -> str:
    """Return the fix that messages about a wrong meta name: the command that rebuilds it."""
    return f"rebuild it: evomesh data repair {bin_path}"


def read_meta(bin_path: Path, mapped: bool = False) -> MetaArray:
    """Open and check the meta of ``bin_path``: [N, 2], int32 or int64, memory-mapped when large or when ``mapped``.

    Checks only what follows from the meta and the file size; a line is checked when it
    is read.

    Raises:
        UserError: the meta is missing, is not such an array, or its rows cannot belong to this file.
    """
    path = meta_path(bin_path)
    if not path.exists():
        raise UserError(
            "the token file has no .meta beside it",
            where=str(bin_path),
            expected=str(path),
            fix=rebuild(bin_path),
            code="EVO-DATA-003",
        )
    _check_header(path, bin_path)
    is_small = path.stat().st_size < MAP_BYTES
    loads_whole = is_small and not mapped
    rows: MetaArray = (
        np.load(path, allow_pickle=False) if loads_whole else map_array(path)
    )
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise UserError(
            f"the meta has shape {rows.shape}",
            where=str(path),
            expected="shape (N, 2): byte offset and token count of each line",
            fix=rebuild(bin_path),
            code="EVO-DATA-004",
        )
    if rows.dtype not in (np.dtype("<i4"), np.dtype("<i8")):
        raise UserError(
            f"the meta has dtype {rows.dtype.str}",
            where=str(path),
            expected="<i4 (int32) or <i8 (int64), little-endian",
            fix=rebuild(bin_path),
            code="EVO-DATA-004",
        )
    # InternEvo's own tokenizer writes int32 offsets. Past 2 GiB they wrap to negative
    # numbers, and from 4 GiB on to offsets of other lines, which nothing else notices.
    size = bin_path.stat().st_size
    if rows.dtype.itemsize == 4 and size > np.iinfo(np.int32).max:
        raise UserError(
            f"the token file has {size:,} bytes, its meta holds int32 offsets, which wrap past {2**31 - 1:,}",
            where=str(path),
            expected="an int64 meta",
            fix=rebuild(bin_path),
            code="EVO-DATA-004",
        )
    _check_rows(rows, size, path, bin_path)
    return rows


def _check_header(path: Path, bin_path: Path) -> None:
    size = path.stat().st_size
    if size == 0:
        raise UserError(
            "the meta is empty (0 bytes)",
            where=str(path),
            fix=rebuild(bin_path),
            code="EVO-DATA-004",
        )
    # NumPy's own messages name neither the file nor what to do, and np.load of a pickle
    # must never be reached.
    with path.open("rb") as file:
        start = file.read(16)
        if start[:6] != b"\x93NUMPY":
            text = start.decode("utf-8", "replace").splitlines()[0]
            raise UserError(
                f"the meta is not an .npy file (it starts with {text!r})",
                where=str(path),
                expected="a NumPy array of (byte offset, tokens) rows",
                fix=rebuild(bin_path),
                code="EVO-DATA-004",
            )
        file.seek(0)
        try:
            shape, _, dtype = read_array_header(file)
        except ValueError as error:
            raise UserError(
                f"the meta has a broken .npy header ({error})",
                where=str(path),
                fix=rebuild(bin_path),
                code="EVO-DATA-004",
            ) from None
        if dtype.hasobject:
            raise UserError(
                "the meta holds pickled Python objects, which are never loaded",
                where=str(path),
                expected="an int32 or int64 array",
                fix=rebuild(bin_path),
                code="EVO-DATA-004",
            )
        elements = int(np.prod(shape, dtype=np.int64))
        expected = file.tell() + elements * dtype.itemsize
    if size != expected:
        kind = "truncated" if size < expected else "longer than its header declares"
        raise UserError(
            f"the meta is {kind}: {size:,} bytes, its header declares {expected:,} (shape {shape})",
            where=str(path),
            fix=rebuild(bin_path),
            code="EVO-DATA-004",
        )


def _check_rows(rows: MetaArray, size: int, path: Path, bin_path: Path) -> None:
    """Check that offsets start at 0, increase and end inside the file, and that counts are not negative."""

    def refuse(row: int, found: str, expected: str) -> UserError:
        return UserError(
            found,
            where=f"{path} row {row}",
            expected=expected,
            fix=rebuild(bin_path),
            code="EVO-DATA-004",
        )

    if len(rows) == 0:
        return
    if rows[0, 0] != 0:
        first = int(rows[0, 0])
        raise refuse(
            0,
            f"the first line starts at byte {first}",
            "byte 0 (a negative offset or a missing row)",
        )
    # In parts, so that a mapped meta is never in memory as a whole.
    for start in range(0, len(rows), CHECK_ROWS):
        # One more, to compare the last with its next.
        part = rows[start : start + CHECK_ROWS + 1]
        wrong = np.flatnonzero(part[1:, 0] <= part[:-1, 0])
        if len(wrong):
            row = start + int(wrong[0]) + 1
            previous, offset = rows[row - 1 : row + 1, 0].tolist()
            raise refuse(
                row,
                f"offset {offset} does not increase (the row before has {previous}; "
                f"the file has {size:,} bytes)",
                "offsets in file order, each larger than the one before",
            )
        wrong = np.flatnonzero(part[:, 1] < 0)
        if len(wrong):
            row = start + int(wrong[0])
            raise refuse(
                row, f"the line has {int(rows[row, 1])} tokens", "a count of at least 0"
            )
    if rows[-1, 0] >= size:
        row = int(np.searchsorted(rows[:, 0], size))
        raise refuse(
            row,
            f"offset {int(rows[row, 0]):,} is past the end of the token file ({size:,} bytes); "
            f"the meta has {counted(len(rows) - row, 'row')} too many or the token file was truncated",
            f"an offset below {size:,}",
        )


def write_meta(
    path: Path, offsets: NDArray[np.int64], lengths: NDArray[np.int64]
) -> None:
    """Write an int64 meta at exactly ``path``, durably: the caller renames it into place."""
    with path.open("wb") as file:
        np.save(file, np.stack([offsets, lengths], axis=1).astype("<i8"))
        file.flush()
        os.fsync(file.fileno())
