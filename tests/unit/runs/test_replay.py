"""What a replay may differ in, and what it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomesh.cli.replay import lines_of
from evomesh.config.json_codec import encode_json
from evomesh.config.record import config_to_dict
from evomesh.config.schema import Config, RunConfig
from evomesh.errors import UserError
from evomesh.monitor.spikes import SPIKES_FILE
from evomesh.runs.read import RunFiles, read_run
from evomesh.runs.replay import (
    ReplayPlan,
    ReplayResult,
    compare_replay,
    plan_replay,
    ranks_of_replay,
)
from tests.support.run_folders import step_row, write_lines, write_run_folder

CONFIG: dict[str, Any] = encode_json(config_to_dict(Config(run=RunConfig(job_name="a"))))  # fmt: skip


def plan_of(tmp_path: Path, bound: float, **figures: Any) -> ReplayPlan:
    """Three replayed steps; the last two have these figures."""
    run = RunFiles(tmp_path, rows={step: step_row(step) for step in range(4)})
    again = [step_row(1, **figures.get("first", {})), step_row(2, **figures), step_row(3)]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", again)
    return ReplayPlan(run, 3, Config(), 1, 1, "", bound, tmp_path)


def test_one_bit_is_found_in_the_same_layout(tmp_path: Path) -> None:
    assert compare_replay(plan_of(tmp_path, 0.0)).differing == []
    result = compare_replay(plan_of(tmp_path, 0.0, loss=3.0000000000000004))
    assert [(one.step, one.name) for one in result.differing] == [(2, "loss")]
    assert result.steps == [1, 2, 3]


def test_in_another_layout_the_first_step_is_judged(tmp_path: Path) -> None:
    later = compare_replay(plan_of(tmp_path, 2e-5, loss=3.3))
    assert later.differing == []
    assert later.largest == pytest.approx(0.1)
    near = plan_of(tmp_path, 2e-5, first={"loss": 4 * (1 + 1e-5), "acc": 0.1})
    assert compare_replay(near).differing == []
    far = plan_of(tmp_path, 2e-5, first={"grad_norm": 1.5 * (1 + 3e-5)})
    assert [one.name for one in compare_replay(far).differing] == ["grad_norm"]
    lost = plan_of(tmp_path, 2e-5, first={"loss/en": "NaN"})
    assert [one.name for one in compare_replay(lost).differing] == ["loss/en"]


def test_the_layout_keeps_the_number_of_data_parallel_ranks(tmp_path: Path) -> None:
    run = read_run(write_run_folder(tmp_path, config=CONFIG, world_size=2))
    assert ranks_of_replay(run, 3, "config") == 2
    assert ranks_of_replay(run, 3, "tensor=2,mode=msp") == 4
    assert ranks_of_replay(run, 3, "tensor=2,pipeline=2") == 8
    with pytest.raises(UserError, match="in the layout"):
        ranks_of_replay(run, 3, "tensors=2")
    with pytest.raises(UserError, match=r"parallel\.tensor\.size: 3 does not divide"):
        ranks_of_replay(run, 3, "tensor=3")


def test_what_a_replay_writes_stays_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    facts = {"config": CONFIG, "world_size": 1, "folder": str(tmp_path)}
    run = read_run(write_run_folder(tmp_path / "run", **facts))
    plan = plan_replay(run, 3, "config", tmp_path / "scratch")
    assert (plan.first_step, plan.checkpoint, plan.bound) == (0, "", 0.0)
    assert plan.config.run.run_dir == str(tmp_path / "scratch")
    assert not plan.config.ckpt.enable_save_ckpt
    assert plan.config.ckpt.load_ckpt_info is None
    with pytest.raises(UserError, match="has not logged step 5"):
        plan_replay(run, 5, "config", tmp_path)
    # One that a spike left out is not logged, and can be examined.
    write_lines(run.folder / SPIKES_FILE, [{"event": "rollback", "left_out": [5, 6]}])
    left_out = plan_replay(run, 5, "config", tmp_path)
    assert left_out.step == 5
    assert lines_of(left_out, ReplayResult())[1:] == [
        "step 5 is not logged: the run left it out because of a spike"
    ]
    gone = read_run(write_run_folder(tmp_path / "run", **(facts | {"folder": "/gone"})))  # fmt: skip
    with pytest.raises(UserError, match="the run was started in is gone"):
        plan_replay(gone, 3, "config", tmp_path)
