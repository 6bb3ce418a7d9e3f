"""The number of ranks that share the optimizer's state, and how much of it is sharded over them.

The state of a matrix is sharded by its rows, in equal parts: a size that does not divide
the rows of a matrix leaves its state whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from evomesh.config.schema import Config
from evomesh.config.size import parameter_counts

if TYPE_CHECKING:
    from evomesh.config.layout import AxisSizes

# The share of the parameters below which a size is warned of.
_ENOUGH = 0.9


class MatrixRows(NamedTuple):
    """Matrices of one shape on one rank: the rows of each, and the elements of all."""

    rows: int
    elements: int


def best_zero(config: Config, sizes: AxisSizes) -> int:
    """Return the divisor of the data-parallel ranks with the least state on a rank; of equals the largest."""
    group = sizes.zero * sizes.replica
    best = group
    least = elements_per_rank(config, sizes, group)
    for size in range(group - 1, 1, -1):
        if group % size:
            continue
        elements = elements_per_rank(config, sizes, size)
        if elements < least:
            best, least = size, elements
    return best


def elements_per_rank(config: Config, sizes: AxisSizes, zero: int) -> int:
    """Return of how many elements of the matrices of all stages a rank has the state, with ``zero`` ranks to share."""
    count = 0
    for matrix in matrix_rows(config, sizes):
        shards = zero if matrix.rows % zero == 0 else 1
        count += matrix.elements // shards
    return count


def sharded_share(config: Config, sizes: AxisSizes, zero: int) -> float:
    """Return the share of the matrices' elements whose state ``zero`` ranks share; 1 for a custom model."""
    whole = sharded = 0
    for matrix in matrix_rows(config, sizes):
        whole += matrix.elements
        if matrix.rows % zero == 0:
            sharded += matrix.elements
    return sharded / whole if whole else 1.0


def matrix_rows(config: Config, sizes: AxisSizes) -> Iterator[MatrixRows]:
    """Yield the matrices of a rank, as if it had all layers; none of a custom model, whose shapes are unknown."""
    model = config.model
    counts = parameter_counts(model)
    if not counts:
        return
    layers = model.num_layers
    hidden = model.hidden_size
    # 1. Blocks. Column-parallel matrices have fewer rows on a tensor rank, row-parallel
    #    ones fewer columns; in isp all of them fewer rows.
    columns = sizes.wp if sizes.isp else sizes.tp
    rows = sizes.wp if sizes.isp else 1
    inputs = 2 if model.use_swiglu else 1
    shapes = (
        (model.qkv_width // columns, model.qkv_width * hidden),
        (hidden // rows, model.attention_width * hidden),
        (model.mlp_width // columns, inputs * model.mlp_width * hidden),
        (hidden // rows, model.mlp_width * hidden),
    )
    for length, elements in shapes:
        yield MatrixRows(length, layers * elements // columns)
    # 2. Embedding and head, whose state in isp is sharded over another axis.
    if sizes.isp and sizes.wp > 1:
        return
    padded = -(-model.vocab_size // sizes.tp)
    of_head = MatrixRows(padded, padded * hidden)
    of_embedding = of_head
    if model.embed_split_hidden:
        columns_of_rank = hidden // sizes.tp
        of_embedding = MatrixRows(model.vocab_size, model.vocab_size * columns_of_rank)
    yield of_embedding
    if counts["head"]:
        yield of_head


def zero_warnings(config: Config, sizes: AxisSizes) -> list[str]:
    """Return a warning of a size that leaves much of the optimizer's state whole on every rank."""
    if sizes.zero == 1 or config.parallel.zero1.fsdp:
        return []  # what fsdp leaves whole has its own
    share = sharded_share(config, sizes, sizes.zero)
    if share >= _ENOUGH:
        return []
    words = (
        f"parallel.zero1.size: the optimizer's state of only {share:.0%} of the parameters is sharded; "
        f"{sizes.zero} ranks do not divide the rows of the other matrices, which each rank has whole"
    )
    best = best_zero(config, sizes)
    if best != sizes.zero:
        of_best = sharded_share(config, sizes, best)
        words += f"; with size={best} it is {of_best:.0%}"
    return [words]
