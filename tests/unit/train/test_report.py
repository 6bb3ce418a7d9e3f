"""Values of a step's line that are derived from its batch."""

from __future__ import annotations

import itertools
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.config.data import DataConfig
from evomesh.config.schema import Config, LossConfig, RunConfig
from evomesh.data.batch import Batch
from evomesh.data.build import build_train_data
from evomesh.optim.zero import StepResult
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.launch import RunContext
from evomesh.train.report import RunReporter
from evomesh.train.state import TrainState
from evomesh.train.step import StepOutput
from evomesh.train.tally import LossTally
from tests.support.covers import covers


@pytest.fixture
def reporter(tmp_path: Path) -> RunReporter:
    config = Config(
        run=RunConfig(run_dir=str(tmp_path)), data=DataConfig(seq_len=8, micro_num=2)
    )
    context = RunContext(
        Grid(), torch.device("cpu"), MODES["mtp"], 0, 1, datetime(2026, 3, 1)
    )
    state = TrainState()
    state.record_step(16, applied=True)
    return RunReporter(config, "", context, state, build_train_data(config.data, 256))


def batch(bounds: list[list[int]]) -> Batch:
    """Two micro-batches of 8 tokens with these document bounds."""
    zeros = torch.zeros(2, 8, dtype=torch.int64)
    longest = max(b - a for row in bounds for a, b in itertools.pairwise(row))
    return Batch(
        zeros, zeros, zeros, zeros, torch.tensor(bounds, dtype=torch.int32), longest
    )


def record(reporter: RunReporter, seconds: float, **figures: Any) -> Any:
    output = StepOutput(
        2.5,
        LossTally(["en"], torch.device("cpu")),
        StepResult(torch.tensor(0.7, dtype=torch.float64)),
        0.3,
        z_loss=0.125,
    )
    given = {"lr": 1e-3, "beta2": 0.95, "loss_scale": 1.0} | figures
    return reporter.step(
        0, batch([[0, 3, 8, 8], [0, 8, 8, 8]]), output, seconds=seconds, **given
    )


@covers("promise:batch-figures")
def test_samples_are_counted_as_segments(reporter: RunReporter) -> None:
    found = record(reporter, 0.5)
    assert (found.num_samples_in_batch, found.largest_length) == (3, 8)
    assert (found.largest_batch, found.smallest_batch) == (2, 1)
    assert (found.micro_num, found.num_consumed_tokens) == (2, 16)


def test_speed_is_tokens_by_seconds(reporter: RunReporter) -> None:
    assert record(reporter, 0.5).tgs == 32.0
    assert record(reporter, 0.25).tflops == 2 * record(reporter, 0.5).tflops


@covers("model.sliding_window")
def test_the_logged_tflops_leave_out_scores_beyond_the_window(
    reporter: RunReporter,
) -> None:
    """All else equal, 8 tokens see 8 others without a window, and 3 with one: the difference is 5 of 8 scores."""
    model = reporter.config.model
    spans = {}
    for window in (None, 3):
        config = model.model_copy(update={"sliding_window": window})
        reporter.config = reporter.config.model_copy(update={"model": config})
        spans[window] = record(reporter, 0.5).tflops
    scores = 3 * 4 * model.num_layers * model.attention_width  # of a pair of tokens
    pairs = 2 * 8 * (8 - 3)
    less = scores * pairs / 0.5 / 1e12
    assert spans[None] - spans[3] == pytest.approx(less, rel=1e-6)


@pytest.mark.parametrize("coefficient", [0.0, 1e-4])
def test_z_loss_is_reported_where_it_is_trained(
    reporter: RunReporter, coefficient: float
) -> None:
    loss = LossConfig(z_loss_coeff=coefficient)
    reporter.config = reporter.config.model_copy(update={"loss": loss})
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "evomesh.train.report.logger.info", lambda _, line: lines.append(line)
        )
        figures = record(reporter, 0.5).values()
    asked = coefficient > 0
    assert (figures.get("z_loss") == 0.125) == asked
    assert lines[0].endswith(",z_loss=0.125") == asked


def test_validation_results_join_the_step(reporter: RunReporter) -> None:
    joined = reporter.validation(
        record(reporter, 0.5), {"val/en_loss": 3.0, "val/en_acc": 0.25}
    )
    assert joined.values()["val/en_loss"] == 3.0
    assert "val/en_loss" not in joined.line()
