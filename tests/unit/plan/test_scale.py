"""Costs of large worlds against arithmetic that does not use their code, and against the tensors of built ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.checkpoint.native.plan import TensorBoxes, describe
from evomesh.checkpoint.native.ring import from_runs, group_by_members, to_runs
from evomesh.cli.app import app
from evomesh.config.layout import axis_sizes
from evomesh.config.schema import Config
from evomesh.config.size import parameter_count
from evomesh.errors import ConfigError
from evomesh.plan.checkpoint_scale import checkpoint_scale, held_boxes
from evomesh.plan.scale import bubble_share, fitting_sizes, world_ranks
from evomesh.plan.trace import built_rank
from tests.unit.plan.test_step_time import config

GRID = {
    "pipeline": {"size": 2},
    "tensor": {"size": 2, "mode": "mtp"},
    "zero1": {"size": 2},
}


def test_boxes_are_those_of_every_built_rank() -> None:
    layout = config(GRID)
    world = world_ranks(axis_sizes(layout.parallel, 8), 8)
    held = held_boxes(layout, 8, world.grids)
    for rank in range(8):
        with built_rank(layout, 8, rank) as (grid, stages, optimizer):
            tensors = {**stages.parameters(), **optimizer.state_shards()}
            local = describe(tensors, grid)
            rows = [TensorBoxes.of(tensor) for tensor in local.values()]
        assert held[rank] == rows
        assert world.grids[rank] == grid


def test_groups_of_a_world_are_counted() -> None:
    """In 32 ranks: 16 of tensor, 16 of pipeline (and of its ends, the same), 4 of data, 8 of zero, 16 of replica."""
    parallel = config(GRID | {"zero1": {"size": 4}}).parallel
    world = world_ranks(axis_sizes(parallel, 32), 32)
    assert world.groups == 16 + 16 + 4 + 8 + 16
    assert world.groups_of_rank == 5


def matrices_and_vectors(layout: Config) -> tuple[int, int]:
    """Return the parameters of all matrices and of all norms, whose states are not sharded."""
    total = parameter_count(layout.model)
    assert total is not None
    vectors = (2 * layout.model.num_layers + 1) * layout.model.hidden_size
    return total - vectors, vectors


@pytest.mark.parametrize("ranks", [4, 16])
def test_a_checkpoint_of_data_parallel_ranks(ranks: int) -> None:
    """A parameter has 2 bytes of weight and 12 of state, of which each of 4 shards has a quarter."""
    layout = config({"zero1": {"size": 4}})
    matrices, vectors = matrices_and_vectors(layout)
    world = world_ranks(axis_sizes(layout.parallel, ranks), ranks)
    found = checkpoint_scale(layout, ranks, world.grids)
    assert found.total == 14 * (matrices + vectors)
    assert found.files == ranks
    # The writers share the work: all boxes together, divided by them.
    assert found.total / ranks <= found.largest_file <= 2.5 * found.total / ranks
    assert found.wanted == 14 * vectors + 2 * matrices + 12 * matrices // 4
    # A start reads everything once: shards by their replicas, the rest by all ranks.
    assert found.read == pytest.approx(found.total / ranks, rel=1e-3)


def test_lists_of_boxes_grow_with_the_ranks() -> None:
    layout = config({"zero1": {"size": 4}})
    sizes = {}
    for ranks in (4, 16):
        world = world_ranks(axis_sizes(layout.parallel, ranks), ranks)
        sizes[ranks] = checkpoint_scale(layout, ranks, world.grids).boxes_message
    assert sizes[16] == 4 * sizes[4]


@pytest.mark.parametrize("micro_batches", [2, 8, 32])
def test_the_bubble_of_equal_stages(micro_batches: int) -> None:
    layout = config({"pipeline": {"size": 4}})
    expected = 3 / (micro_batches + 3)
    assert bubble_share(layout, 16, micro_batches) == pytest.approx(expected)
    assert bubble_share(config(), 16, micro_batches) == 0


def test_only_worlds_that_the_layout_divides() -> None:
    layout = config({"pipeline": {"size": 2}, "tensor": {"size": 2, "mode": "mtp"}})
    assert fitting_sizes(layout, [2, 8, 10, 64]) == [8, 64]
    with pytest.raises(ConfigError, match="2 processes"):
        fitting_sizes(layout, [2, 6])


def test_ranks_that_want_the_same_are_found_and_written_short() -> None:
    keys = [["all", f"half {rank % 2}", "all too", f"own {rank}"] for rank in range(6)]
    groups = group_by_members(keys)
    for rank, own in enumerate(groups):
        same_half = [other for other in range(6) if other % 2 == rank % 2]
        expected = sorted([([*range(6)], [0, 2]), (same_half, [1]), ([rank], [3])])
        assert [tuple(group) for group in own] == expected
    for members in ([], [7], [3, 9], [0, 1, 2, 3, 10, 20, 30, 31], [*range(5, 99, 7)]):
        assert from_runs(to_runs(members)) == members
    assert len(to_runs(range(0, 16_384, 8))) == 1


CONFIG = """
model_type = "LLAMA2"
model = dict(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=64, multiple_of=8, dtype="torch.bfloat16")
data = dict(seq_len=16, micro_bsz=1, micro_num=4, train_folder=None)
parallel = dict(pipeline=dict(size=2))
"""


@pytest.mark.slow
def test_the_command_prints_every_number_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    arguments = ["scale", str(path), "--ranks", "4", "--ranks", "8", "--json"]
    printed = CliRunner().invoke(app, [*arguments, "--restart", "0", "--mtbf", "100"])
    assert printed.exit_code == 0, printed.output
    four, eight = [json.loads(line) for line in printed.output.splitlines()]
    assert (four["ranks"], eight["ranks"]) == (4, 8)
    assert four["tokens"] == 16 * 4 * 2
    assert four["bubble"] == eight["bubble"] == pytest.approx(1 / 5)
    # Of a constant batch each of twice as many ranks has half the micro-batches.
    assert eight["constant_bubble"] == pytest.approx(1 / 3)
    assert four["failures"]["between"] == 2 * eight["failures"]["between"] == 90_000
    assert four["start"]["messages"] == eight["start"]["messages"]
    assert four["start"]["answered"] < eight["start"]["answered"]
