"""``X.bin.cache``: the tokens of a token file as one flat int32 array, so that reading needs no parsing."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomesh.data.token_files.lines import (
    BadLineError,
    TokenArray,
    parse_line,
    parse_plain,
)
from evomesh.data.token_files.mapping import map_array
from evomesh.data.token_files.meta import read_meta, rebuild
from evomesh.data.token_files.part_files import (
    open_part,
    remove_dead_parts,
    report_disk_errors,
)
from evomesh.errors import UserError

BLOCK = 512  # lines parsed together


def cache_path(bin_path: Path) -> Path:
    """Return the path of a token file's cache."""
    return Path(f"{bin_path}.cache")


def open_cache(bin_path: Path, tokens: int) -> NDArray[np.int32] | None:
    """Map the cache; None when there is none, or it is older than the token file or has another size."""
    path = cache_path(bin_path)
    try:
        if path.stat().st_mtime_ns < bin_path.stat().st_mtime_ns:
            return None
        cache = map_array(path)
    except (OSError, ValueError):
        return None
    fits = cache.dtype == np.int32 and cache.shape == (tokens,)
    return cache if fits else None


def write_cache(bin_path: Path) -> int:
    """Read every line of a token file and write its cache; return the number of tokens.

    Raises:
        UserError: the meta does not match the lines.
    """
    lengths = read_meta(bin_path)[:, 1]
    total = int(lengths.sum(dtype=np.int64))
    remove_dead_parts(cache_path(bin_path))
    part, locked = open_part(cache_path(bin_path))
    try:
        # Written, not mapped: on a full disk a write is refused, while the first touch of
        # a mapped page would kill the process.
        # The header alone is that of an .npy file; the tokens follow block by block.
        header = {"descr": "<i4", "fortran_order": False, "shape": (total,)}
        with report_disk_errors(cache_path(bin_path)):
            np.lib.format.write_array_header_1_0(locked, header)
        filled = 0
        with bin_path.open("rb") as file:
            for first in range(0, len(lengths), BLOCK):
                declared = lengths[first : first + BLOCK]
                lines = list(islice(file, len(declared)))
                tokens = parse_plain(lines, declared)
                if tokens is None:
                    tokens = _parse_one_by_one(
                        lines, declared.tolist(), bin_path, first
                    )
                with report_disk_errors(cache_path(bin_path)):
                    locked.write(tokens.astype("<i4").tobytes())
                filled += len(tokens)
        if filled != total:
            raise UserError(
                f"the lines hold {filled:,} tokens, the meta declares {total:,}",
                where=str(bin_path),
                fix=rebuild(bin_path),
                code="EVO-DATA-004",
            )
        with report_disk_errors(cache_path(bin_path)):
            locked.flush()
        os.replace(part, cache_path(bin_path))
    finally:
        part.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk fails again at close
            locked.close()
    return total


def _parse_one_by_one(
    lines: list[bytes], declared: list[int], bin_path: Path, first: int
) -> TokenArray:
    """Parse lines with every check; ``first`` lines of the file come before them."""
    parsed: list[int] = []
    number = first
    for line, length in zip(lines, declared, strict=False):
        number += 1
        where = f"{bin_path} line {number}"
        try:
            tokens = parse_line(line)
        except BadLineError as bad:
            raise UserError(
                bad.found, where=where, expected=bad.expected, code="EVO-DATA-004"
            ) from None
        if len(tokens) != length:
            raise UserError(
                f"the meta declares {length} tokens, the line has {len(tokens)}",
                where=where,
                fix=rebuild(bin_path),
                code="EVO-DATA-004",
            )
        parsed += tokens
    return np.array(parsed, np.int64)
