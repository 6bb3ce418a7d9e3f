"""The end of a run by its validations, against counting them by hand."""

from __future__ import annotations

import math

import pytest

from evomesh.config.data import StopWhenConfig
from evomesh.errors import UserError
from evomesh.train.early_stop import EarlyStop
from tests.support.covers import covers

FIGURES = ("val/en_loss", "val/en_acc")


def stops_after(values: list[float], metric: str, patience: int, delta: float) -> int:
    """Validations until the end; 0 for none."""
    config = StopWhenConfig(metric=metric, patience=patience, min_delta=delta)
    early_stop = EarlyStop(config, FIGURES)
    for number, value in enumerate(values, 1):
        # A resume between any two changes nothing.
        resumed = EarlyStop(config, FIGURES)
        resumed.load_state(early_stop.state())
        early_stop = resumed
        early_stop.after_validation({metric: value})
        if early_stop.is_due:
            return number
    return 0


@covers("data.stop_when.metric", "data.stop_when.patience", "data.stop_when.min_delta")
@pytest.mark.parametrize(
    ("values", "metric", "patience", "delta", "expected"),
    [
        ([5, 4, 3, 2, 1], "val/en_loss", 1, 0.0, 0),
        ([5, 4, 4, 4, 1], "val/en_loss", 2, 0.0, 4),
        ([5, 4, 4.5, 3, 3.5, 3.2, 3.1], "val/en_loss", 3, 0.0, 7),
        # A gain must be above the difference, from the best and not from the last.
        ([5, 4.75, 4.5, 4.0, 3.75], "val/en_loss", 2, 0.5, 3),
        ([5, 4.75, 4.25, 4.0, 3.5], "val/en_loss", 2, 0.5, 0),
        ([0.1, 0.2, 0.2, 0.15], "val/en_acc", 2, 0.0, 4),
        ([0.1, 0.2, 0.3, 0.4], "val/en_acc", 1, 0.0, 0),
        ([math.nan, math.nan, 3], "val/en_loss", 2, 0.0, 2),
        ([5, math.nan, 4, math.inf], "val/en_loss", 2, 0.0, 0),
    ],
)
def test_patience(
    values: list[float], metric: str, patience: int, delta: float, expected: int
) -> None:
    assert stops_after(values, metric, patience, delta) == expected


def test_checkpoints_of_earlier_versions_have_no_counts() -> None:
    early_stop = EarlyStop(StopWhenConfig(metric="val/en_loss"), FIGURES)
    early_stop.load_state(None)
    assert (early_stop.best, early_stop.since_best) == (None, 0)


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("eval/arc/acc", [0.1, 0.2, 0.3, 0.3, 0.2], 5),
        ("eval/texts/bits_per_byte", [3.0, 2.0, 2.5, 2.5], 4),
    ],
)
def test_a_task_says_what_is_better(
    metric: str, values: list[float], expected: int
) -> None:
    of_tasks = {"eval/arc/acc": True, "eval/texts/bits_per_byte": False}
    config = StopWhenConfig(metric=metric, patience=2, min_delta=0.0)
    early_stop = EarlyStop(config, FIGURES, of_tasks)
    for value in values:
        assert not early_stop.is_due
        early_stop.after_validation({"val/en_loss": 9.0})  # without the figure
        early_stop.after_validation({metric: value})
    assert early_stop.is_due and len(values) == expected
    with pytest.raises(UserError, match="no validation of this run gives") as caught:
        EarlyStop(StopWhenConfig(metric="eval/arc/f1"), FIGURES, of_tasks)
    assert "eval/arc/acc" in caught.value.expected
