"""Tokens per step of both systems, counted one rank at a time, and ``evomesh batch``."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.config.batch_size import (
    InternEvoBatch,
    XTunerBatch,
    match_accumulative_counts,
    match_micro_num,
)
from evomesh.errors import UserError
from tests.support.golden import write_bin

GUIDE = InternEvoBatch(
    gpus=64, tensor=2, pipeline=1, micro_num=4, micro_bsz=2, seq_len=2048
)
sizes = st.integers(1, 8)


def run(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["batch", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output.splitlines()


@given(sizes, sizes, sizes, sizes, sizes, st.integers(1, 64))
def test_tokens_are_those_of_every_rank_added_up(
    tensor: int,
    pipeline: int,
    replicas: int,
    micro_num: int,
    micro_bsz: int,
    seq_len: int,
) -> None:
    """Tensor and pipeline peers of a rank read the same packs: only the first of each group counts."""
    gpus = tensor * pipeline * replicas
    batch = InternEvoBatch(gpus, tensor, pipeline, micro_num, micro_bsz, seq_len)
    tokens = 0
    for rank in range(gpus):
        reads_new_packs = rank % tensor == 0 and rank // tensor % pipeline == 0
        for _ in range(micro_num if reads_new_packs else 0):
            tokens += micro_bsz * seq_len
    assert batch.tokens_per_step == tokens


def test_the_guides_formula_doubles_the_batch_of_its_own_example() -> None:
    match = match_accumulative_counts(
        GUIDE.tokens_per_step, 64, sequence_parallel=1, max_length=4096
    )
    assert (GUIDE.tokens_per_step, match.exact) == (524_288, 2)
    # TP * PP * TP / SP.
    by_the_guide = GUIDE.tensor * GUIDE.pipeline * GUIDE.tensor // 1
    assert (
        XTunerBatch(64, 1, by_the_guide, 4096).tokens_per_step
        == 2 * GUIDE.tokens_per_step
    )


@given(sizes, sizes, sizes, sizes, st.integers(1, 64))
def test_a_match_has_equal_tokens_or_its_neighbors_enclose_them(
    sp: int, replicas: int, micro_num: int, micro_bsz: int, max_length: int
) -> None:
    gpus = sp * replicas
    ours = InternEvoBatch(gpus, 1, 1, micro_num, micro_bsz, 48)
    match = match_accumulative_counts(ours.tokens_per_step, gpus, sp, max_length)
    if match.exact is not None:
        assert (
            XTunerBatch(gpus, sp, match.exact, max_length).tokens_per_step
            == ours.tokens_per_step
        )
        return
    tokens = [
        XTunerBatch(gpus, sp, number, max_length).tokens_per_step
        for number in match.nearest
    ]
    assert tokens[-1] > ours.tokens_per_step
    assert len(tokens) == 1 or tokens[0] < ours.tokens_per_step


def test_the_other_way_round() -> None:
    theirs = XTunerBatch(
        gpus=64, sequence_parallel=4, accumulative_counts=6, max_length=32768
    )
    match = match_micro_num(theirs.tokens_per_step, GUIDE)
    assert match.exact is not None
    assert (
        InternEvoBatch(64, 2, 1, match.exact, 2, 2048).tokens_per_step
        == theirs.tokens_per_step
    )
    assert match_micro_num(3 * 131_072, GUIDE).value == Fraction(3)
    assert match_micro_num(65_536, GUIDE).nearest == [1]


def test_command_solves_for_xtuner() -> None:
    options = [
        "--gpus",
        "64",
        "--tp",
        "2",
        "--micro-num",
        "4",
        "--micro-bsz",
        "2",
        "--seq-len",
        "2048",
    ]
    lines = run(*options)
    assert lines[0].endswith("= 524,288 tokens per optimizer step")
    assert lines[-1] == "equal with accumulative_counts=2"
    assert run(*options, "--sp", "2")[2:] == [
        "equal with accumulative_counts=4",
        "in a config that multiplies by sequence_parallel_size itself: accumulative_counts=2",
    ]
    assert run(*options, "--sp", "4", "--max-length", "32768")[2:] == [
        "equal with accumulative_counts=1",
        "a config that multiplies accumulative_counts by sequence_parallel_size=4 itself cannot give 1: "
        "remove that line from it",
    ]


def test_command_says_which_fraction_is_in_the_way() -> None:
    lines = run(
        "--gpus",
        "8",
        "--micro-num",
        "5",
        "--micro-bsz",
        "1",
        "--seq-len",
        "2048",
        "--max-length",
        "4096",
    )
    assert "it would be 5/2 (2.5)" in lines[2]
    assert lines[3:] == [
        "  nearest: accumulative_counts=2: 65,536 tokens, -20.0%",
        "  nearest: accumulative_counts=3: 98,304 tokens, +20.0%",
    ]


def test_command_solves_for_micro_num() -> None:
    options = ["--gpus", "8", "--micro-bsz", "1", "--seq-len", "4096"]
    lines = run(
        *options, "--max-length", "32768", "--sp", "2", "--accumulative-counts", "2"
    )
    assert lines[-1] == "equal with micro_num=8"


def test_epochs_and_steps_of_a_folder(tmp_path: Path) -> None:
    write_bin(tmp_path / "en/a.bin", [[1] * 50] * 10)  # 500 tokens: 7 packs of 64
    write_bin(tmp_path / "en/b.bin", [[1] * 50] * 4)  # 200 tokens: 3 packs
    sizes = ["--gpus", "2", "--micro-num", "2", "--micro-bsz", "2", "--seq-len", "32"]
    lines = run(*sizes, "--data", str(tmp_path), "--epochs", "2", "--steps", "5")
    assert (
        "one epoch is 10 packs of 64 tokens = 2 steps and 2 packs of the next"
        in lines[-3]
    )
    assert lines[-2:] == ["2 epochs: total_steps=5", "5 steps: 2.000 epochs"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpus", "8", "--seq-len", "8", "--tp", "3"], "--tp times --pp of 2 or 4"),
        (["--gpus", "8", "--seq-len", "8", "--sp", "5"], "--sp of 4 or 8"),
        (["--gpus", "8"], "no sequence length"),
        (["--gpus", "8", "--seq-len", "8", "--epochs", "2"], "add --data FOLDER"),
    ],
)
def test_sizes_that_do_not_fit(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(*arguments)
