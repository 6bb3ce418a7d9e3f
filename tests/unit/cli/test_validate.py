"""What ``evomesh validate --json`` prints."""

from __future__ import annotations

import json

import pytest

from evomesh.cli.validate import as_object
from evomesh.train.validation_run import ValidationResult


def test_figures_that_are_no_numbers_are_words_in_json() -> None:
    figures = {"val/en_loss": float("nan"), "val/en_plex": float("inf"), "x": 1.5}
    printed = as_object(ValidationResult("weights", 7, figures, 0, 2))

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    found = json.loads(printed, parse_constant=refuse)
    assert found["figures"] == {
        "val/en_loss": "NaN",
        "val/en_plex": "Infinity",
        "x": 1.5,
    }
    assert (found["source"], found["step"], found["ranks"]) == ("weights", 7, 2)
