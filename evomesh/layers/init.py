"""Initial weights that do not depend on how the model is sharded (invariant 9 in docs/architecture.md).

Shapes: R rows and C columns of a parameter's global matrix.

Every element is a function of (seed, parameter name, global position). The global
matrix is divided into fixed tiles of 256 x 256. A counter-based generator (Philox,
Salmon et al., 2011), keyed by seed and name, draws each tile separately: the index of
the tile is the upper half of the counter. A rank draws only the tiles that overlap its
shard, always in float32 on the CPU, whatever the device and dtype of the parameter. No
tile depends on another, so that threads may draw them in any order.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import ShardSpec

TILE = 256  # rows and columns; this defines the numbers and is not a tuning knob
MOST_THREADS = 16


@dataclass(frozen=True)
class InitialWeight:
    """Distribution of a parameter's initial values; ``scale`` is the standard deviation, or the value of a constant."""

    kind: Literal["normal", "uniform", "constant"]
    scale: float


def fill_parameter(
    name: str,
    parameter: torch.Tensor,
    spec: ShardSpec,
    axes: Mapping[str, Axis],
    initial: InitialWeight,
    seed: int,
    threads: int | None = None,
) -> None:
    """Write this rank's shard of the global parameter ``name``.

    Args:
        name: global name; with ``seed`` it selects the random stream.
        spec: the global shape and how it is sharded.
        axes: the grid's axes by name; a missing axis counts as not sharded.
        threads: that draw at one time; the values do not depend on it. None: one per core, at most ``MOST_THREADS``.

    Raises:
        ValueError: a dim after the second is sharded.
    """
    shard = parameter.detach()
    if initial.kind == "constant":
        shard.fill_(initial.scale)
        return
    matrix_rows, matrix_columns = _matrix_shape(spec.shape)
    rows, columns = _local_rectangle(name, spec, axes)
    local = shard.view(len(rows), len(columns))

    def fill_band(band_index: int) -> None:
        """Draw one row of tiles and copy those of its rows that are in this shard."""
        # Of a shard with the rows 200 to 399, the band 0 to 255 has the first 56 and the
        # band 256 to 511 the other 144.
        band = _tile_range(band_index, matrix_rows)
        drawn = _draw_band(
            name,
            band_index,
            len(band),
            columns,
            matrix_columns,
            initial,
            seed,
        )
        owned = _overlap(rows, band)
        target = local[_place_in(rows, owned)]
        source = drawn[_place_in(band, owned)]
        target.copy_(source)

    _for_each(fill_band, _tiles_over(rows), threads or _drawing_threads())


def _overlap(a: range, b: range) -> range:
    """Return the indices that are in both ranges."""
    start = max(a.start, b.start)
    stop = min(a.stop, b.stop)
    return range(start, stop)


def _place_in(whole: range, part: range) -> slice:
    """Return where ``part`` is in a tensor that begins with the first index of ``whole``."""
    start = part.start - whole.start
    return slice(start, start + len(part))


def _for_each(action: Callable[[int], None], indices: range, threads: int) -> None:
    """Call ``action`` with every index, in several threads if there is more than one."""
    workers = min(threads, len(indices))
    if workers <= 1:
        for index in indices:
            action(index)
        return
    # numpy draws without the interpreter's lock.
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(action, indices):
            pass  # an error in a thread is raised here


def _drawing_threads() -> int:
    """Return one thread per core of this process, as many as the ranks of a large node can share its cores with."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, MOST_THREADS)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return R and C: a vector is one row, and all dims after the first are flattened into columns."""
    if len(shape) == 1:
        return 1, shape[0]
    return shape[0], math.prod(shape[1:])


def _local_rectangle(
    name: str,
    spec: ShardSpec,
    axes: Mapping[str, Axis],
) -> tuple[range, range]:
    """Return the global rows and columns of the matrix that this rank holds."""
    ranges = spec.local_ranges(axes)
    if len(ranges) == 1:
        return range(1), ranges[0]
    has_late_shard = any(dim > 1 for _, dim in spec.shards)
    if has_late_shard:
        raise ValueError(
            f"{name}: only the first two dims of a parameter may be sharded, not {spec.shards}"
        )
    rows, second = ranges[:2]
    # Indices 2 to 3 of the second dim of [R, 4, 5] are columns 10 to 19 of the matrix
    # [R, 20]
    inner = math.prod(spec.shape[2:])  # columns per index of the second dim
    columns = range(second.start * inner, second.stop * inner)
    return rows, columns


def _tiles_over(indices: range) -> range:
    """Return the indices of the tiles that overlap a range of rows or columns."""
    return range(indices.start // TILE, -(-indices.stop // TILE))


def _tile_range(index: int, length: int) -> range:
    """Return the rows or columns of tile ``index``; the last tile ends at ``length``."""
    start = index * TILE
    return range(start, min(start + TILE, length))


def _draw_band(
    name: str,
    band_index: int,
    height: int,
    columns: range,
    width: int,
    initial: InitialWeight,
    seed: int,
) -> torch.Tensor:
    """Draw one row of tiles and return its ``columns``, [height, len(columns)] float32."""
    # Columns 300 to 600 overlap the tiles 1 (256 to 511) and 2 (512 to 767): both are
    # drawn whole, then cut.
    tile_indices = _tiles_over(columns)
    tiles = []
    for tile_index in tile_indices:
        tile_width = len(_tile_range(tile_index, width))
        tile = _draw_tile(
            name,
            (band_index, tile_index),
            (height, tile_width),
            initial,
            seed,
        )
        tiles.append(tile)
    band = np.concatenate(tiles, axis=1)
    offset = tile_indices.start * TILE  # global column of the band's first one
    start = columns.start - offset
    stop = columns.stop - offset
    return torch.from_numpy(band[:, start:stop])


def _stream_key(name: str, seed: int) -> int:
    """Return the key of a parameter's generator: 128 bits that its name and the seed determine."""
    stream = f"{seed}/{name}"
    digest = hashlib.blake2b(stream.encode(), digest_size=16)
    return int.from_bytes(digest.digest(), "little")


def _draw_tile(
    name: str,
    tile: tuple[int, int],
    shape: tuple[int, int],
    initial: InitialWeight,
    seed: int,
) -> npt.NDArray[np.float32]:
    # The lower two of the four counter words count draws, the upper two are the index
    # of the tile.
    counter = [0, 0, *tile]
    key = _stream_key(name, seed)
    philox = np.random.Philox(key=key, counter=counter)
    generator = np.random.Generator(philox)
    if initial.kind == "normal":
        standard_deviation = np.float32(initial.scale)
        standard = generator.standard_normal(shape, dtype=np.float32)
        return standard * standard_deviation
    # A uniform distribution on [-a, a] has the standard deviation a / sqrt(3).
    half_width = np.float32(math.sqrt(3) * initial.scale)
    unit = generator.random(shape, dtype=np.float32)  # in [0, 1)
    symmetric = unit * 2 - 1  # in [-1, 1)
    return symmetric * half_width
