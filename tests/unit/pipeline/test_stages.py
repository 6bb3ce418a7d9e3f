"""The partition of layers into stages, by InternEvo's rule and balanced."""

from __future__ import annotations

import itertools

import pytest

from evomesh.pipeline.stages import layer_ranges, stages_of_rank


def counts(*arguments: object, **options: object) -> list[int]:
    return [len(stage) for stage in layer_ranges(*arguments, **options)]  # type: ignore[arg-type]


def test_the_documents_partitions() -> None:
    assert counts(32, 4) == [8, 8, 8, 8]
    assert counts(30, 4) == [7, 7, 8, 8]
    assert counts(48, 4, 2) == [6] * 8
    assert counts(28, 4, 2) == [3, 3, 4, 4] * 2  # each chunk is partitioned on its own


@pytest.mark.parametrize(
    ("layers", "pp", "chunks"), itertools.product((8, 9, 13, 31), (1, 2, 3, 4), (1, 2))
)
@pytest.mark.parametrize("ends", [None, (0.0, 0.0), (1.7, 1.7)])
def test_stages_are_contiguous_and_none_is_empty(
    layers: int, pp: int, chunks: int, ends: tuple[float, float] | None
) -> None:
    ranges = layer_ranges(layers, pp, chunks, ends)
    assert len(ranges) == pp * chunks
    assert [layer for stage in ranges for layer in stage] == list(range(layers))
    assert all(ranges)


def test_balance_takes_layers_from_the_ends() -> None:
    assert counts(32, 4, ends=(2.0, 2.0)) == [7, 9, 9, 7]
    assert counts(8, 4, ends=(0.0, 4.0)) == [2, 2, 3, 1]


def test_too_many_stages() -> None:
    with pytest.raises(
        ValueError, match="8 stages need at least as many layers, there are 7"
    ):
        layer_ranges(7, 4, 2)


def test_stages_of_a_rank() -> None:
    assert stages_of_rank(1, 4, 1, "1f1b") == [1]
    assert stages_of_rank(1, 4, 2, "interleaved") == [1, 5]
    assert [stages_of_rank(rank, 2, 2, "zbv") for rank in range(2)] == [[0, 3], [1, 2]]
