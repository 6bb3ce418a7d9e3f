"""The ledger of a run folder: its config, its ranks, and what spikes left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.config.json_codec import encode_json
from evomesh.config.loader import load_config
from evomesh.config.record import config_to_dict
from evomesh.errors import UserError
from evomesh.monitor.history import HISTORY_FILE
from evomesh.monitor.spikes import SPIKES_FILE
from evomesh.runs.ledger import open_run_data, run_parts, untrained_steps
from evomesh.runs.read import StartRecord
from tests.support.poison import POISONED, STEP, write_poisoned_run
from tests.support.run_folders import write_lines, write_run_folder

DOCUMENT = f"{POISONED[0]}:{POISONED[1]}"


def write_run(tmp_path: Path, *spikes: dict[str, object]) -> Path:
    settings = load_config(str(write_poisoned_run(tmp_path))).config
    config = encode_json(config_to_dict(settings))
    run = write_run_folder(tmp_path / "run", config=config, folder=str(tmp_path), world_size=2)  # fmt: skip
    if spikes:
        write_lines(run / SPIKES_FILE, list(spikes))
    return run


def ledger(run: Path, *options: str) -> list[str]:
    result = CliRunner().invoke(app, ["ledger", str(run), *options])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_a_run_folder_has_config_and_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path)
    lines = [json.loads(line) for line in ledger(run, "--step", "3", "--json")]
    assert {line["rank"] for line in lines} == {0, 1}
    assert all("skipped" not in line for line in lines)
    # Two ranks read twice as much a step.
    use, count = ledger(run, "--document", DOCUMENT)
    assert use.startswith(f"step {STEP // 2} rank")
    assert count == "used in 1 step"
    use, _ = ledger(run, "--gpus", "1", "--document", DOCUMENT)
    assert use.startswith(f"step {STEP} rank 0 micro-batch 2")
    assert ledger(run, "--until", "1", "--document", DOCUMENT) == ["used in 0 steps"]


def test_a_step_has_the_ranks_of_the_start_that_did_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank up to the document's step, then two with half the micro-batches: the same packs in each step."""
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path)
    start, *_ = (run / HISTORY_FILE).read_text().splitlines()
    whole = load_config(str(tmp_path / "config.py"))
    half = load_config(str(tmp_path / "config.py"), ["data.micro_num=2"])
    assert whole.config.data.micro_num == 4
    configs = [encode_json(config_to_dict(one.config)) for one in (whole, half)]
    parts = zip((0, STEP + 1), (1, 2), configs, strict=True)
    rows = [
        json.dumps({**json.loads(start), "step": step, "world_size": ranks, "config": config})
        for step, ranks, config in parts
    ]  # fmt: skip
    (run / HISTORY_FILE).write_text("\n".join(rows) + "\n")
    use, _ = ledger(run, "--document", DOCUMENT)
    assert use.startswith(f"step {STEP} rank 0 micro-batch 2")
    before, after = (
        [json.loads(line) for line in ledger(run, "--step", str(step), "--json")]
        for step in (STEP, STEP + 1)
    )
    assert {line["rank"] for line in before} == {0}
    assert {line["rank"] for line in after} == {0, 1}
    alone = ledger(run, "--step", str(STEP + 1), "--gpus", "4", "--json")
    assert {json.loads(line)["rank"] for line in alone} == {0, 1, 2, 3}


def test_starts_that_read_alike_are_one_part(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    start, *_ = (run / HISTORY_FILE).read_text().splitlines()
    # A resume, a rollback to step 2, and a start that found all steps done.
    sizes = {0: 2, 5: 2, 2: 2, STEP: 1, 40: 1}
    starts = [
        StartRecord({**json.loads(start), "step": step, "world_size": ranks})
        for step, ranks in sizes.items()
    ]
    parts = run_parts(starts)
    steps = [(part.gpus, part.steps) for part in parts]
    assert steps == [(2, range(STEP)), (1, range(STEP, 40))]


def test_steps_that_a_spike_left_out_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spike = {"event": "spike", "step": STEP // 2, "applied": False, "left_out": [STEP // 2]}  # fmt: skip
    run = write_run(tmp_path, spike)
    use, count = ledger(run, "--document", DOCUMENT)
    assert use.endswith("(skipped: spike)")
    assert count == "used in 0 steps, skipped in 1"
    lines = ledger(run, "--step", str(STEP // 2), "--json")
    assert {json.loads(line)["skipped"] for line in lines} == {"spike"}


def test_the_last_try_of_a_step_counts() -> None:
    def spike(step: int, applied: bool) -> dict[str, object]:
        return {"event": "spike", "step": step, "applied": applied, "left_out": []}

    rows = [spike(1, True), spike(2, False), spike(3, False), spike(3, True)]
    assert untrained_steps(rows) == {2}
    going_back = {"event": "spike", "step": 9, "applied": False, "left_out": [8, 9]}
    assert untrained_steps([*rows, going_back, {"event": "court", "step": 9}]) == {2, 8, 9}  # fmt: skip


def test_what_has_no_ledger_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path)
    result = CliRunner().invoke(app, ["ledger", str(run), "--step", "1", "--set", "a=1"])  # fmt: skip
    assert result.exit_code == 2 or isinstance(result.exception, UserError)
    # A damaged start does not hide the others: its folder is not that of this test.
    with (run / HISTORY_FILE).open("a") as file:
        file.write('{"event": "start", "folder": "/gone"}\n')
    monkeypatch.chdir("/")
    assert ledger(run, "--step", "1")
    assert Path.cwd() == tmp_path
    (run / "history.jsonl").unlink()
    with pytest.raises(UserError, match="how the run was started"):
        open_run_data(str(run))
