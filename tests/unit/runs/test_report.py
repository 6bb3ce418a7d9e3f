"""``evomesh report``: what is in the page of a run, of a broken run, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.errors import UserError
from evomesh.monitor.status import FOLDER, RankStatus, encode
from evomesh.runs.page import render_page
from evomesh.runs.payload import payload_of, reduce_points
from evomesh.runs.read import read_run
from tests.support.run_folders import (
    history_of_two_starts,
    step_row,
    write_lines,
    write_run_folder,
)

NOW = 1_700_000_000.0


def floats(text: str) -> list[float]:
    content = base64.b64decode(text)
    return list(struct.unpack(f"<{len(content) // 4}f", content))


def figure(run: dict[str, Any], name: str) -> list[tuple[float, float]]:
    column = run["columns"][name]
    steps = floats(run["steps"][column["x"]])
    return list(zip(steps, floats(column["y"]), strict=True))


def entry_of(folder: Path) -> dict[str, Any]:
    (entry,) = payload_of([read_run(folder)], NOW)["runs"]
    assert isinstance(entry, dict)
    return entry


def embedded(page: str) -> Any:
    """What a browser would read from the page's payload element."""
    found = re.search(r'id="payload">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_figures_are_those_of_the_files(tmp_path: Path) -> None:
    entry = entry_of(write_run_folder(tmp_path / "demo" / "run"))
    assert entry["name"] == "demo/run"
    assert figure(entry, "loss") == [(s, 5.0 - s) for s in range(5)]
    assert figure(entry, "speed") == [(s, 200.0) for s in range(5)]  # two ranks
    assert figure(entry, "memory") == [(2, 1000.0)]
    assert [value for _, value in figure(entry, "seconds")] == [4, 5, 4, 4, 4]
    saves = [(one["step"], one["seconds"], one["final"]) for one in entry["saves"]]
    assert saves == [(2, 2.0, False), (5, 1.5, True)]
    assert entry["summary"]["restarts"] == 1
    assert entry["summary"]["restart_cost"] == 30


def test_steps_at_the_end_without_figures_count_as_done(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run")
    status = RankStatus(0, phase="done", step=7, total=7)
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / FOLDER / "rank-00000.jsonl").write_bytes(encode(status))
    summary = entry_of(folder)["summary"]
    assert (summary["steps"], summary["next_step"], summary["total"]) == (5, 7, 7)


def _write_history(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    write_lines(folder / "history.jsonl", rows)
    return entry_of(folder)


def test_the_speed_of_a_step_counts_the_ranks_that_did_it(tmp_path: Path) -> None:
    first, *rest = history_of_two_starts()
    first["world_size"] = 4  # the second start, from step 2, has two
    entry = _write_history(write_run_folder(tmp_path / "run"), [first, *rest])
    speeds = [value for _, value in figure(entry, "speed")]
    assert speeds == [400.0] * 2 + [200.0] * 3
    assert entry["summary"]["speed"] == 200.0


def test_a_rollback_is_no_restart(tmp_path: Path) -> None:
    rows = history_of_two_starts()
    began = rows[0]["began"]
    same = [row | {"began": began} if "began" in row else row for row in rows]
    entry = _write_history(write_run_folder(tmp_path / "run"), same)
    summary = entry["summary"]
    assert (summary["restarts"], summary["rollbacks"]) == (0, 1)


def test_each_save_is_listed_once(tmp_path: Path) -> None:
    start = {"event": "start", "time": 0, "began": 0, "step": 0}
    save = {"save": 0.5}
    rows = [
        start,
        {"step": 0, "time": 1.0, "seconds": 1.0, "phases": save},
        {"event": "end", "time": 2, "step": 1, "outcome": "stopped", "phases": save},
        start | {"time": 5, "began": 5, "step": 1},  # stopped at once
        {"event": "end", "time": 6, "step": 1, "outcome": "stopped", "phases": save},
    ]
    entry = _write_history(write_run_folder(tmp_path / "run"), rows)
    saves = [(one["step"], one["seconds"], one["final"]) for one in entry["saves"]]
    assert saves == [(1, 1.0, False)]


def test_a_broken_run_has_a_page(tmp_path: Path) -> None:
    rows = [
        step_row(0),
        step_row(1, loss="NaN", grad_norm="Infinity"),
        step_row(3),
        step_row(3, loss=1.0),  # an old file may have a step twice
        {"loss": 3.0},
        {"step": 4},  # a version without the other figures
    ]
    write_lines(tmp_path / "metrics.jsonl", rows, torn='{"step": 5, "lo')
    write_lines(tmp_path / "history.jsonl", [{"step": 1}], torn="{")
    (tmp_path / "alerts.jsonl").write_bytes(b"\xff\n[1]\n")
    entry = entry_of(tmp_path)
    loss = figure(entry, "loss")
    assert [step for step, _ in loss] == [0, 1, 3]
    assert np.isnan(loss[1][1])
    assert loss[2][1] == 1.0
    assert entry["skipped"] == [{"step": 1, "loss": "NaN", "grad_norm": "Infinity"}]
    assert entry["unreadable"] == {
        "metrics.jsonl": 2,
        "history.jsonl": 1,
        "alerts.jsonl": 2,
    }
    assert not entry["has_history"]
    page = render_page(payload_of([read_run(tmp_path)], NOW))
    assert embedded(page)["runs"][0]["times"] is None


def test_a_run_without_any_step_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert entry_of(tmp_path)["columns"] == {}


def test_extremes_are_kept_of_a_long_run() -> None:
    values = np.sin(np.arange(10_000) / 50)
    values[4321], values[8765], values[100:200] = 99, -99, np.nan
    steps, kept = reduce_points(np.arange(10_000), values, 200)
    assert len(steps) <= 200
    assert (np.nanmax(kept), np.nanmin(kept)) == (99, -99)
    assert {4321, 8765} <= set(steps.tolist())
    assert (np.diff(steps) > 0).all()
    assert np.array_equal(values[steps], kept, equal_nan=True)


def test_no_secret_is_in_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    config = {
        "monitor": {"alert": {"feishu_alert_address": "https://a.example/hook/abc"}},
        "data": {"train_folder": "/d/correct-horse-battery", "url": "s3://u:pass@h/x"},
    }
    folder = write_run_folder(
        tmp_path,
        config=config,
        command="evomesh train correct-horse-battery --set x.password=hunter2hunter2",
        reason="from https://user:swordfish@h/c",
    )
    alert = {"kind": "crash", "text": "token hf_abcdefghijklmnopqrstuvwxyz0123"}
    write_lines(folder / "alerts.jsonl", [alert])
    page = render_page(payload_of([read_run(folder)], NOW))
    for secret in ("correct-horse", "hook/abc", "u:pass", "hunter2", "swordfish", "hf_abc"):  # fmt: skip
        assert secret not in page, secret


def test_no_text_of_a_run_becomes_part_of_the_page(tmp_path: Path) -> None:
    text = "</script><script>alert(1)</script> <!-- @@STYLE@@"
    folder = write_run_folder(tmp_path, command=text)
    page = render_page(payload_of([read_run(folder)], NOW))
    assert embedded(page)["runs"][0]["facts"]["command"] == text
    assert "alert(1)</script>" not in page
    # Nothing from elsewhere: no address in an attribute that loads.
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)


def test_the_command_writes_one_file(tmp_path: Path) -> None:
    write_run_folder(tmp_path / "a")
    write_run_folder(tmp_path / "b")
    out = tmp_path / "out.html"
    arguments = ["report", str(tmp_path / "a"), str(tmp_path / "b"), str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert len(embedded(out.read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "the last argument is"),
        (["{run}", "{run}"], "a file whose name ends with .html"),
        (["{run}/absent", "{run}/x.html"], "does not exist"),
        (["{run}/logs", "{run}/x.html"], "is not a run folder"),
        (["{run}", "{run}/folder.html"], "is a folder"),
        (["{run}", "/proc/x.html"], "cannot write /proc/x.html"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    run = write_run_folder(tmp_path)
    (run / "folder.html").mkdir()
    (run / "logs").mkdir()
    given = [argument.format(run=run) for argument in arguments]
    with pytest.raises(UserError) as error:
        CliRunner().invoke(app, ["report", *given], catch_exceptions=False)
    assert message in str(error.value)
    assert not list(run.glob("*.part"))


def test_spikes_with_what_was_found_about_them(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    spike = {"event": "spike", "time": 1.0, "what": ["loss"], "grad_norm": 2.0}
    spike |= {
        "median": {"loss": 4.0},
        "action": "warned",
        "left_out": [],
        "policy": "x",
    }
    document = {"file": "en/a.bin", "row": 7, "start": 0, "stop": 9, "text": "bad"}
    found = {"rank": 1, "micro_batch": 2, "suspicion": 30.0, "documents": [document]}
    court = {"micro_batches": [found, {"rank": 0}, "old"], "layers": None}
    lines = [
        {**spike, "step": 3, "loss": 50.0},
        {"event": "new run", "time": 1.5},
        {**spike, "step": 3, "loss": 60.0},
        {**spike, "step": 4, "loss": "NaN", "action": "rolled back", "left_out": [4]},
        {"event": "court", "time": 2.0, "step": 3, **court},
        {"event": "court", "time": 2.0, "step": 9, **court},
        {"event": "rollback", "time": 3.0, "step": 4, "to": 2},
    ]
    write_lines(folder / "spikes.jsonl", lines, torn="{")
    entry = entry_of(folder)
    first, second = entry["spikes"]
    assert (first["step"], first["loss"], first["action"]) == (3, 60.0, "warned")
    suspect, other = first["court"]["micro_batches"]
    assert (suspect["suspicion"], suspect["documents"]) == (30.0, [document])
    assert other["documents"] == []
    assert first["court"]["layers"] == []
    assert (second["loss"], second["to"], second["left_out"]) == ("NaN", 2, [4])
    assert "court" not in second
    assert entry["unreadable"] == {"spikes.jsonl": 1}


def test_samples_by_prompt(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    lines: list[dict[str, Any]] = []
    for step in range(200):
        for prompt in ("One", "Two"):
            text = f"{prompt} {step}" + "x" * 3000
            lines.append({"step": step, "tokens": 64 * step, "prompt": prompt, "text": text})  # fmt: skip
    lines.append({"step": 200, "text": "of another version"})
    write_lines(folder / "samples.jsonl", lines)
    entry = entry_of(folder)
    assert [sample["prompt"] for sample in entry["samples"]] == ["One", "Two"]
    answers = entry["samples"][1]["answers"]
    steps = [answer["step"] for answer in answers]
    assert len(steps) == 60
    assert (steps[0], steps[-1]) == (0, 199)
    assert set(np.diff(steps)) <= {3, 4}
    for answer in answers:
        assert answer["text"].startswith(f"Two {answer['step']}x")
        assert len(answer["text"]) == 2000
        assert answer["tokens"] == 64 * answer["step"]


def test_the_validation_before_the_first_step_is_the_first_point(
    tmp_path: Path,
) -> None:
    first = step_row(0, **{"val_start/en_loss": 9.5, "val_start/cn_loss": 8.5})
    rows = [first, step_row(1, **{"val/en_loss": 3.5})]
    write_lines(write_run_folder(tmp_path) / "metrics.jsonl", rows)
    entry = entry_of(tmp_path)
    assert figure(entry, "val/en_loss") == [(0, 9.5), (1, 3.5)]
    assert figure(entry, "val/cn_loss") == [(0, 8.5)]


def test_evaluations_have_figures(tmp_path: Path) -> None:
    rows = [step_row(0, **{"eval/arc/acc": 0.25}), step_row(1)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert figure(entry_of(tmp_path), "eval/arc/acc") == [(0, 0.25)]


def test_prediction_beside_measurement(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    assert entry_of(folder)["predictions"] == []
    plan = {"gpus": 2, "tokens_per_step": 80, "peak": {"total": 4000}}
    (folder / "plan.json").write_text(json.dumps(plan))
    rows = entry_of(folder)["predictions"]
    assert [tuple(row.values()) for row in rows] == [
        ("plan_ranks", 2, 2),
        ("plan_tokens", 80, 64),
        ("plan_memory", 4000, 1000),
    ]
    # Of a model whose activations are not known, and named by the option.
    other = tmp_path / "other.json"
    other.write_text('{"gpus": 4}')
    out = tmp_path / "out.html"
    arguments = ["report", str(folder), str(out), "--plan", str(other)]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    (run,) = embedded(out.read_text())["runs"]
    assert [row["predicted"] for row in run["predictions"]] == [4]
    other.write_text("[]")
    with pytest.raises(UserError, match="it is not a plan"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
