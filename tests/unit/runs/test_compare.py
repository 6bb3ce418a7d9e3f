"""``evomesh compare``: the first step that differs, what does not count, exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.errors import UserError
from evomesh.runs.compare import relative_distance
from tests.support.run_folders import step_row, write_lines, write_run_folder

FACTS: dict[str, Any] = {
    "config": {"adam": {"lr": 1e-3}, "run": {"job_name": "a", "seed": 1}},
    "data": {"hash": "d1", "files": [{"file": "x.bin", "tokens": 5, "hash": "h1"}]},
    "software": {"evomesh": "1", "digest": "c1", "torch": "2.13"},
    "layout": {"dp": 2, "tp": 1},
}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_run_folder(tmp_path / "a", **FACTS)


def outcome(first: Path, second: Path, *options: str) -> tuple[int, str]:
    arguments = ["compare", str(first), str(second), *options]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def rows_with(changes: dict[int, dict[str, Any]], count: int = 5) -> list[dict[str, Any]]:  # fmt: skip
    return [step_row(step, **changes.get(step, {})) for step in range(count)]


def test_times_and_names_do_not_count(tmp_path: Path, first: Path) -> None:
    renamed = {"adam": {"lr": 1e-3}, "run": {"job_name": "b", "seed": 1}}
    second = write_run_folder(tmp_path / "b", **(FACTS | {"config": renamed}))
    slower = {step: {"tgs (tokens/gpu/second)": 7.0} for step in range(5)}
    # Another layout: a rank has fewer micro-batches.
    slower[3]["micro_num"] = slower[3]["num_samples_in_batch"] = 99
    write_lines(second / "metrics.jsonl", rows_with(slower))
    code, text = outcome(first, second)
    assert code == 0, text
    assert "0 differ, and 1 that do not count" in text
    assert "run.job_name: a | b (a place or a name: does not count)" in text
    assert "equal to the bit in every common step" in text


def test_the_first_step_that_differs(tmp_path: Path, first: Path) -> None:
    second = write_run_folder(tmp_path / "b", **FACTS)
    nearly = math.nextafter(3.0, 4.0)  # one bit
    changes = {2: {"loss": nearly}, 3: {"loss": 2.5, "acc": 0.5, "grad_norm": "NaN"}}
    write_lines(second / "metrics.jsonl", rows_with(changes, count=7))
    code, text = outcome(first, second)
    assert code == 1
    assert "0 to 4 and 0 to 6; 5 in common" in text
    assert "differ in 2 steps, first in step 2" in text
    assert f"step 2: loss 3.0 | {nearly!r} (+4.44e-16, relative 1.5e-16)" in text
    found = json.loads(outcome(first, second, "--json")[1])
    assert [one["name"] for one in found["first"]] == ["loss"]
    largest = {one["name"]: one for one in found["largest"]}
    assert largest["loss"]["step"] == 3
    assert largest["loss"]["relative"] == 0.25
    assert largest["grad_norm"]["relative"] == "inf"
    assert "acc" not in largest  # one run has not logged it
    assert found["equal"] is False


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"config": {"adam": {"lr": 2e-3}, "run": {"job_name": "a", "seed": 1}}}, "adam.lr: 0.001 | 0.002"),
        ({"data": {"hash": "d2", "files": [{"file": "x.bin", "tokens": 5, "hash": "h2"}]}}, "fingerprint: d1 | d2"),
        ({"software": {"evomesh": "1", "digest": "c2", "torch": "2.13"}}, "digest: c1 | c2"),
        ({"software": {"evomesh": "1", "digest": "c1", "torch": "2.14"}}, "torch: 2.13 | 2.14"),
        ({"layout": {"dp": 1, "tp": 2}}, "dp: 2 | 1"),
    ],
)  # fmt: skip
def test_what_was_run_counts(
    tmp_path: Path, first: Path, change: dict[str, Any], line: str
) -> None:
    second = write_run_folder(tmp_path / "b", **(FACTS | change))
    code, text = outcome(first, second)
    assert code == 1
    assert line in text


def test_a_run_without_history_is_compared_by_its_figures(
    tmp_path: Path, first: Path
) -> None:
    write_lines(tmp_path / "old" / "metrics.jsonl", rows_with({}))
    code, text = outcome(first, tmp_path / "old")
    assert code == 0
    assert "config     not recorded by both runs" in text


@pytest.mark.parametrize("rows", [[], [step_row(9)]])
def test_no_common_step(
    tmp_path: Path, first: Path, rows: list[dict[str, Any]]
) -> None:
    write_lines(tmp_path / "b" / "metrics.jsonl", rows)
    with pytest.raises(UserError, match=r"no step in common: 0 to 4 and (none|9 to 9)"):
        arguments = ["compare", str(first), str(tmp_path / "b")]
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_secrets_are_not_printed(
    tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    config = {"data": {"train_folder": "/x/correct-horse-battery"}}
    second = write_run_folder(tmp_path / "b", **(FACTS | {"config": config}))
    for options in ((), ("--json",)):
        assert "correct-horse" not in outcome(first, second, *options)[1]


def test_distances() -> None:
    assert relative_distance(4.0, 5.0) == 0.25
    assert relative_distance(-4.0, -3.0) == 0.25
    assert relative_distance(0.0, 1.0) == math.inf
    assert relative_distance(math.nan, math.nan) == 0
    assert relative_distance(math.inf, math.inf) == 0
    assert relative_distance(math.nan, 1.0) == math.inf
