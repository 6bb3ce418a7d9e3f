"""Orthogonal directions of matrices by Newton-Schulz iterations, as Muon takes them.

Shapes: r rows, c columns; any dims before them count matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Coefficients of an odd polynomial whose iterates take singular values in (0, 1] to
# about 1, small ones fast (Jordan et al., Muon, 2024).
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
SMALLEST_NORM = 1e-7  # a matrix of zeros stays one
# Root mean square of an update of AdamW, in units of its learning rate (Liu et al.,
# arXiv 2502.16982).
ADAMW_RMS = 0.2


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Return [..., r, c] with the singular vectors of each matrix, and singular values near 1."""
    shape = matrices.shape
    *_, rows, columns = shape
    if rows > columns:
        # The product with itself is as small as the shorter side.
        flat = orthogonalize(matrices.mT, steps)
        tall: Tensor = flat.mT
        return tall
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    norms = norms.clamp(min=SMALLEST_NORM)
    scaled = matrices / norms
    x = scaled.reshape(-1, rows, columns)
    for _ in range(steps):
        x = _newton_schulz(x)
    directions: Tensor = x.reshape(shape)
    return directions


def _newton_schulz(x: Tensor) -> Tensor:
    """Return a x + (b X + c X X) x of [n, r, c], with X = x x^T; one kernel multiplies, scales and adds."""
    gram = torch.bmm(x, x.mT)
    polynomial = torch.baddbmm(
        gram,
        gram,
        gram,
        beta=CUBIC,
        alpha=QUINTIC,
    )
    return torch.baddbmm(x, polynomial, x, beta=LINEAR)


def rms_scale(rows: int, columns: int) -> float:
    """Return the factor that gives an orthogonal matrix the root mean square of AdamW's updates."""
    return ADAMW_RMS * math.sqrt(max(rows, columns))


def update_directions(
    matrices: Tensor, packed_rows: Sequence[int], steps: int
) -> Tensor:
    """Return [..., r, c]: for each matrix its orthogonal direction, with AdamW's root mean square.

    Args:
        packed_rows: widths along the rows of the matrices that are packed in turn (``ShardSpec.packed_rows``), each of
            which has a separate direction and scale; empty for one matrix.
    """
    *leading, rows, columns = matrices.shape
    if not packed_rows:
        return orthogonalize(matrices, steps) * rms_scale(rows, columns)
    # Rows of a key/value head: its queries, its key, its value; then the next head.
    period = sum(packed_rows)
    groups = rows // period
    grouped = matrices.reshape(*leading, groups, period, columns)
    directions = torch.empty_like(grouped)
    start = 0
    for width in packed_rows:
        packed = grouped.narrow(-2, start, width)
        one_matrix = packed.flatten(-3, -2)
        direction = orthogonalize(one_matrix, steps)
        direction = direction * rms_scale(groups * width, columns)
        place = directions.narrow(-2, start, width)
        place.copy_(direction.reshape(place.shape))
        start += width
    return directions.flatten(-3, -2)
