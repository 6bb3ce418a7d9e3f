"""``history.jsonl``: its lines, and what a killed or a full disk leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from evomesh.monitor.history import HistoryFile


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_start_its_steps_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run" / "history.jsonl"
    history = HistoryFile(path)
    before = time.time()
    history.start({"step": 3, "began": 1.0})
    history.begin_step()
    for _ in range(2):
        with history.phase("data wait"):
            time.sleep(0.02)
    history.step_done(3, memory=17)
    history.begin_step()
    with history.phase("validation"):
        pass
    history.step_done(4, memory=0)
    with history.phase("save"):
        pass
    history.end(5, "done")
    start, first, second, end = lines(path)
    assert start["event"] == "start"
    assert (start["step"], start["began"]) == (3, 1.0)
    assert before <= start["time"] <= first["time"] + 0.001 <= end["time"] + 0.002
    assert (first["step"], first["memory"]) == (3, 17)
    assert 0.04 <= first["phases"]["data wait"] <= first["seconds"]
    # Those of the step before are not counted again.
    assert set(second["phases"]) == {"validation"}
    assert (end["step"], end["outcome"], set(end["phases"])) == (5, "done", {"save"})


def test_a_resumed_run_adds_to_it_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n{"st')
    history = HistoryFile(path)
    history.start({"step": 1})
    history.end(1, "stopped")
    content = path.read_text().splitlines()
    assert content[:2] == ['{"step": 1}', '{"st']
    assert [json.loads(line)["event"] for line in content[2:]] == ["start", "end"]


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "history.jsonl", None):
        history = HistoryFile(path)
        history.start({})
        history.begin_step()
        history.step_done(0, 1)
        history.end(1, "done")
