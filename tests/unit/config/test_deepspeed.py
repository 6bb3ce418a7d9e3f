"""XTuner's --deepspeed: what each strategy becomes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.config.deepspeed import deepspeed_settings
from evomesh.config.loader import load_config
from evomesh.errors import UserError
from tests.support.covers import covers

pytestmark = covers("promise:deepspeed")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.py"
    path.write_text(
        'data = dict(train_folder="x")\nmodel = dict(dtype="torch.float32")\nparallel = dict(zero1=8)\n'
    )
    return str(path)


@pytest.mark.parametrize(("stage", "fsdp"), [(1, False), (2, True), (3, True)])
def test_a_stage_cuts_over_all_data_parallel_ranks(
    stage: int, fsdp: bool, config: str
) -> None:
    sets, warnings = deepspeed_settings(f"deepspeed_zero{stage}")
    zero1 = load_config(config, sets).config.parallel.zero1
    assert (zero1.size, zero1.fsdp) == (-1, fsdp)
    assert len(warnings) == (stage > 1)


def test_the_stage_of_a_json_file_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}
        )
    )
    assert deepspeed_settings(str(path))[0] == [
        "parallel.zero1=dict(size=-1, fsdp=True)"
    ]
    for text in (
        "{",
        "{}",
        "[]",
        '{"zero_optimization": {"stage": 0}}',
        '{"zero_optimization": {"stage": "x"}}',
    ):
        path.write_text(text)
        with pytest.raises(UserError, match="stage"):
            deepspeed_settings(str(path))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("spelling", ["name", "optimizer", "param"])
def test_offload_changes_the_memory_alone_and_is_reported(
    stage: int, spelling: str, tmp_path: Path
) -> None:
    flag = f"deepspeed_zero{stage}_offload"
    if spelling != "name":
        zero = {"stage": stage, f"offload_{spelling}": {"device": "cpu"}}
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        flag = str(path)
    settings, warnings = deepspeed_settings(flag)
    assert settings == deepspeed_settings(f"deepspeed_zero{stage}")[0]
    (line,) = [warning for warning in warnings if "host memory" in warning]
    assert line.startswith(f"--deepspeed {flag}: nothing is moved")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="unknown strategy 'zero9'"):
        deepspeed_settings("zero9")


def test_the_flag_of_the_documents(config: str) -> None:
    result = CliRunner().invoke(
        app, ["train", config, "--deepspeed", "deepspeed_zero4_offload"]
    )
    assert isinstance(result.exception, UserError) and "unknown strategy" in str(
        result.exception
    )
    assert (
        "--work-dir"
        in CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    )
