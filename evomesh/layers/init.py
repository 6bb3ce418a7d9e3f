"""Initial weights that do not depend on how the model is cut.

Shapes: R rows and C columns of a parameter's global matrix.

Every element is a function of (seed, parameter name, global position): a counter-based generator (Philox, Salmon et
al., 2011) is keyed by seed and name and draws fixed tiles, the tile's index being the upper half of its counter. A rank
draws only the tiles that it owns a part of. Always float32 on the CPU, whatever the device and dtype of the parameter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import ShardSpec

TILE = 256  # rows and columns; part of the numbers' definition, not a tuning knob


@dataclass(frozen=True)
class InitialWeight:
    """What a parameter starts as. ``scale`` is the standard deviation (normal, uniform) or the value (constant)."""

    kind: Literal["normal", "uniform", "constant"]
    scale: float


def fill_parameter(
    name: str,
    parameter: torch.Tensor,
    spec: ShardSpec,
    axes: Mapping[str, Axis],
    initial: InitialWeight,
    seed: int,
) -> None:
    """Writes this rank's part of the global parameter ``name``.

    Args:
        name: global name; with ``seed`` it selects the stream.
        spec: the global shape and how it is cut.
        axes: the grid's axes by name; an axis that is missing counts as not cut.
    """
    with torch.no_grad():
        if initial.kind == "constant":
            parameter.fill_(initial.scale)
            return
        shape = spec.shape if len(spec.shape) > 1 else (1, *spec.shape)
        if len(spec.shape) == 1:
            rows, columns = range(1), spec.local_ranges(axes)[0]
        else:
            if any(dim > 1 for _, dim in spec.shards):
                raise ValueError(
                    f"{name}: only the first two dims of a parameter may be cut, not {spec.shards}"
                )
            inner = math.prod(shape[2:])
            rows, second = spec.local_ranges(axes)[:2]
            columns = range(second.start * inner, second.stop * inner)
        local = parameter.view(len(rows), len(columns))
        for band in range(rows.start // TILE, -(-rows.stop // TILE)):
            drawn = _band(name, band, shape[0], columns, math.prod(shape[1:]), initial, seed)
            first, last = max(rows.start, band * TILE), min(rows.stop, (band + 1) * TILE)
            local[first - rows.start : last - rows.start].copy_(
                drawn[first - band * TILE : last - band * TILE]
            )


def _band(
    name: str, band: int, rows: int, columns: range, width: int, initial: InitialWeight, seed: int
) -> torch.Tensor:
    """[rows of the band, len(columns)] float32: one row of tiles, restricted to ``columns``."""
    height = min(TILE, rows - band * TILE)
    first = columns.start // TILE
    tiles = []
    for tile in range(first, -(-columns.stop // TILE)):
        tile_width = min(TILE, width - tile * TILE)
        tiles.append(_draw(name, (band, tile), (height, tile_width), initial, seed))
    offset = first * TILE
    return torch.from_numpy(np.concatenate(tiles, axis=1)[:, columns.start - offset : columns.stop - offset])


def _draw(
    name: str, tile: tuple[int, int], shape: tuple[int, int], initial: InitialWeight, seed: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    # The lower two of the four counter words count draws, the upper two name the tile.
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, *tile]))
    if initial.kind == "normal":
        return generator.standard_normal(shape, dtype=np.float32) * np.float32(initial.scale)
    half_width = np.float32(math.sqrt(3) * initial.scale)
    return (generator.random(shape, dtype=np.float32) * 2 - 1) * half_width
