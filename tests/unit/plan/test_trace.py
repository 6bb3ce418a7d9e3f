"""A traced step against a real one, and a world that no machine here has."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.config.loader import load_config
from evomesh.errors import UserError
from evomesh.plan.trace import hold, trace
from tests.dist.layouts import Layout, T
from tests.dist.test_traffic import step_traffic
from tests.support.pool import Pool

SEVEN_B = str(Path(__file__).parents[3] / "configs/7B_sft.py")


def without_loss(
    calls: Counter[tuple[str, str, int]],
) -> dict[tuple[str, str, int], int]:
    """On the CPU the loss leaves out tokens without a target, of which a trace knows nothing: 4 numbers a token."""
    return {key: count for key, count in calls.items() if key[2] > T * 4 * 8}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=4, mode="mtp", packs=2),
        Layout(tensor=2, mode="fsp", pipeline=2),
        Layout(tensor=2, mode="mtp", pipeline=2, chunks=2),
        Layout(tensor=4, mode="isp", packs=1),
        Layout(pipeline=2, chunks=2, schedule="zbv", ranks=2),
        Layout(tensor=2, mode="isp", weight=4, model={"checkpoint": 0.5}),
        Layout(mode="isp", weight=2, ranks=2, parallel={"weight": {"overlap": True}}),
        Layout(tensor=2, mode="msp", parallel={"zero1": {"fsdp": True}}),
    ],
    ids=str,
)
def test_a_trace_sends_what_a_real_step_sends(pool: Pool, layout: Layout) -> None:
    for rank, (real, _) in enumerate(
        pool.run(step_traffic, layout, ranks=layout.ranks)
    ):
        found = trace(layout.config, layout.ranks, rank)
        calls = Counter(
            (call.operation, call.axis, call.nbytes)
            for call in found.traffic.calls[: found.passes]
        )
        assert without_loss(calls) == without_loss(real)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_tied_embedding_is_held_once_at_each_end(schedule: str) -> None:
    """Against the same layout untied: the last rank holds one weight, in a V the first rank one instead of two."""
    chunks = 2 if schedule == "zbv" else 1
    layout = Layout(
        pipeline=4, chunks=chunks, schedule=schedule, model={"num_layers": 8}
    )
    untied = layout.config
    tied = untied.model_copy(
        update={"model": untied.model.model_copy(update={"tie_word_embeddings": True})}
    )
    matrix = untied.model.vocab_size * untied.model.hidden_size * 8  # float64
    saved = [
        hold(untied, 4, rank).parameters - hold(tied, 4, rank).parameters
        for rank in range(4)
    ]
    assert saved == ([matrix, 0, 0, 0] if schedule == "zbv" else [0, 0, 0, 0])
    whole = Layout(ranks=1, model={"num_layers": 8})
    one = replace(whole, model={**whole.model, "tie_word_embeddings": True})
    assert hold(whole.config, 1).parameters - hold(one.config, 1).parameters == matrix


def test_seven_billion_on_1024_ranks() -> None:
    sizes = [
        "parallel.tensor=dict(size=8,mode='msp')",
        "parallel.pipeline.size=4",
        "parallel.zero1.size=8",
    ]
    config = load_config(SEVEN_B, sizes).config
    start = time.monotonic()
    found = trace(config, 1024, 517)
    assert time.monotonic() - start < 60
    grid = found.grid
    assert [(axis.rank, axis.size) for axis in (grid.pp, grid.dp, grid.tp)] == [
        (2, 4),
        (0, 32),
        (5, 8),
    ]
    # Products and the biases of q, k and v, all cut over tensor.
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 3 * 4096
    whole = 3 * 4096  # norms and the bias of the output product
    assert found.parameters == 2 * 8 * (layer // 8 + whole)
    assert found.gradients == 2 * found.parameters
    hidden = 2 * 4096 * config.data.packed_length
    sent = [call.nbytes for call in found.traffic.calls if call.operation == "send"]
    assert sent == [hidden // 8] * 2 * config.data.micro_num
    blocks = Counter(
        call.operation
        for call in found.traffic.calls
        if call.axis == "tp" and call.nbytes == hidden
    )
    assert blocks == {
        "all_gather": 4 * 8 * config.data.micro_num,
        "reduce_scatter": 4 * 8 * config.data.micro_num,
    }


@pytest.mark.slow
def test_optimizer_bytes_are_the_formula() -> None:
    config = load_config(SEVEN_B, ["parallel.zero1.size=8"]).config
    found = trace(config, 8, 3)
    vectors = 32 * (3 * 4096 + 3 * 4096) + 4096  # biases and norms, whole on every rank
    matrices = 7_321_948_160 - vectors
    assert found.parameters == 2 * (matrices + vectors)
    # Master and two moments, float32.
    assert found.optimizer == 12 * (matrices // 8 + vectors)


@pytest.mark.slow
def test_cut_weights_are_a_part_of_the_whole() -> None:
    sets = [
        "parallel.tensor=dict(size=2,mode='isp')",
        "parallel.weight.size=4",
        "data.micro_num=1",
    ]
    isp = load_config(SEVEN_B, sets).config
    # Embedding and head over tensor; the last norm whole.
    ends = 2 * 103168 * 4096 // 2 + 4096
    blocks = 7_321_948_160 - 2 * 103168 * 4096 - 4096
    found = trace(isp, 8, 3)
    assert found.parameters == 2 * (blocks // 4 + ends)
    sent = Counter(
        (call.operation, call.nbytes)
        for call in found.traffic.calls
        if call.axis == "wp"
    )
    assert sent == {
        ("all_gather", 2 * blocks // 32): 2 * 32,
        ("reduce_scatter", 4 * blocks // 32): 32,  # in float32
    }
    fsdp = load_config(SEVEN_B, ["parallel.zero1.fsdp=True"]).config
    held = hold(fsdp, 64, 63)
    assert held.parameters == 2 * ((blocks + 2 * 103168 * 4096) // 64 + 4096)
    assert (held.gradients, held.optimizer) == (
        2 * held.parameters,
        6 * held.parameters,
    )
    assert held.layers == list(range(32))


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="12 processes cannot be divided"):
        trace(load_config(SEVEN_B, ["parallel.tensor.size=8"]).config, 12)


@pytest.mark.slow
def test_command() -> None:
    result = CliRunner().invoke(
        app,
        [
            "plan",
            SEVEN_B,
            "--gpus",
            "1024",
            "--trace",
            "--set",
            "parallel.tensor.size=8",
        ],
    )
    assert result.exit_code == 0, result.output
    assert "rank 0 of 1024: pp 0 of 1, dp 0 of 128, tp 0 of 8" in result.output
    assert "one step of this rank" in result.output
    size, unit = result.output.split("parameters ")[1].split()[:2]
    assert math.isclose(float(size), 1748 / 1024, rel_tol=0.01)
    assert unit.startswith("GiB")


def test_command_without_a_trace_shows_sizes() -> None:
    sets = ["--set", "parallel=dict(tensor=dict(size=8,mode='msp'),pipeline=4,zero1=8)"]
    result = CliRunner().invoke(
        app, ["plan", SEVEN_B, "--gpus", "1024", "--rank", "517", *sets]
    )
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "rank 517 of 1024: pp 2 of 4, dp 0 of 32, tp 5 of 8" in words
    assert "layers 16 to 23 of 32" in words
    assert "7,321,948,160 parameters" in words and "524,288 tokens per step" in words
    assert "one step of this rank" not in words and "--trace" in words
