"""A round of diagnosis over four ranks: every figure is gathered, and groups are kept apart."""

from __future__ import annotations

import torch

from evomesh.train.diagnosis import Diagnosis, gather_over, groups_by_axis
from tests.support.pool import Pool, grid_of


def round_of(rank: int) -> tuple[list[int], list[float], dict[str, list[int]]]:
    grid = grid_of(tensor=2)
    diagnosis = Diagnosis(1.5, grid, torch.device("cpu"))
    figures = gather_over(grid, diagnosis._measure(float(rank)))
    groups = groups_by_axis(figures)
    firsts = {axis: sorted(times) for axis, times in groups.items()}
    return [row.rank for row in figures], [row.fwd_bwd for row in figures], firsts


def test_every_rank_has_the_figures_of_all(pool: Pool) -> None:
    """Ranks 0 and 1 are a row (tp), 0 and 2 a column (dp)."""
    expected = ([0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0], {"dp": [0, 1], "tp": [0, 2]})
    assert pool.run(round_of) == [expected] * 4
