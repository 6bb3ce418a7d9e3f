"""Trackers: what they get, that one which fails costs nothing else, and the real packages without a network."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evomesh.config import trackers
from evomesh.config.redact import REDACTED, redact_text
from evomesh.config.trackers import TrackerRegistry
from evomesh.errors import UserError
from evomesh.monitor.trackers import group
from evomesh.monitor.trackers.group import TrackerGroup
from evomesh.monitor.trackers.tracker import TrackedRun
from tests.support.covers import covers


class RecordingTracker:
    """Writes down its calls; raises in the call that ``fails`` names."""

    def __init__(self, log: str, fails: str = "", waits: bool = False) -> None:
        self.log = Path(log)
        self.fails = fails
        self.waits = waits

    def _note(self, *values: Any) -> None:
        if values[0] == self.fails:
            raise ConnectionError("no route to https://user:hunter2pass@host")
        with self.log.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self.waits:
            threading.Event().wait(5)

    def start(self, run: TrackedRun) -> str:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as some packages do
        self._note("start", run.name, run.run_id, run.step, dict(run.config))
        return run.run_id or "id-7"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._note("scalars", step, dict(values))

    def text(self, name: str, value: str) -> None:
        self._note("text", name, value)

    def file(self, path: Path) -> None:
        self._note("file", path.name)

    def finish(self, complete: bool) -> None:
        self._note("finish", complete)


def settings(log: Path, **options: Any) -> dict[str, Any]:
    return {"type": f"{__name__}:RecordingTracker", "log": str(log), **options}


def run(folder: Path, step: int, *trackers: dict[str, Any], steps: int = 2) -> None:
    tracked = TrackerGroup(trackers, redact_text)
    config = {"adam.lr": 0.1, "run.note": "https://me:hunter2pass@host/x"}
    tracked.start("job", folder, config, step)
    tracked.text("config", "api_key = 'hunter2pass'")
    for number in range(step, step + steps):
        tracked.scalars(number, {"loss": 1.0 / (number + 1)})
    tracked.file(folder / "a.txt")
    tracked.finish(complete=True)


def calls(log: Path) -> list[list[Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@covers("monitor.trackers")
def test_a_tracker_gets_everything_without_secrets_and_is_continued(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    handler = signal.getsignal(signal.SIGTERM)
    run(tmp_path, 0, settings(log))
    assert signal.getsignal(signal.SIGTERM) is handler
    run(tmp_path, 2, settings(log), steps=1)
    first, second = calls(log)[:6], calls(log)[6:]
    config = {"adam.lr": 0.1, "run.note": f"https://{REDACTED}@host/x"}
    assert first == [
        ["start", "job", None, 0, config],
        ["text", "config", f"api_key = '{REDACTED}'"],
        ["scalars", 0, {"loss": 1.0}],
        ["scalars", 1, {"loss": 0.5}],
        ["file", "a.txt"],
        ["finish", True],
    ]
    assert second[0] == ["start", "job", "id-7", 2, config]
    assert second[2] == ["scalars", 2, {"loss": 1 / 3}]
    # A new run in the same folder is a new tracked run.
    run(tmp_path, 0, settings(log))
    assert calls(log)[11][:4] == ["start", "job", None, 0]


@pytest.mark.parametrize("fails", ["start", "scalars", "text", "file", "finish"])
def test_one_that_fails_is_named_once_and_the_other_gets_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    run(tmp_path, 0, settings(bad, fails=fails), settings(good))
    assert len(calls(good)) == 6
    warnings = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 1
    text = warnings[0].getMessage()
    assert "gets nothing more, and training continues: ConnectionError" in text
    assert "hunter2pass" not in text


def test_one_that_is_too_slow_is_given_up(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group, "QUEUE_LENGTH", 3)
    monkeypatch.setattr(group, "FINISH_SECONDS", 0.01)
    slow = TrackerGroup([settings(tmp_path / "log")], redact_text)
    slow.start("job", tmp_path, {}, 0)
    (feed,) = slow._feeds
    feed.tracker.waits = True  # type: ignore[attr-defined]
    for step in range(9):
        slow.scalars(step, {})
    slow.finish(complete=True)
    text = caplog.text
    assert text.count("gets nothing more") == 1 and "3 calls behind" in text


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"type": "no_such_module:Tracker"}, "No module named 'no_such_module'"),
        ({"type": f"{__name__}:Missing"}, "no attribute 'Missing'"),
        ({"type": f"{__name__}:RecordingTracker", "x": 1}, "unexpected keyword"),
    ],
)
def test_a_class_that_cannot_be_used(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TrackerGroup([setting], redact_text)


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "swanlab"])
def test_a_package_that_is_not_installed_names_the_extra(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'evomesh\[trackers\]'"):
        TrackerGroup([{"type": kind}], redact_text)


def test_json_lines(tmp_path: Path) -> None:
    run(tmp_path, 0, {"type": "jsonl"})
    run(tmp_path, 2, {"type": "jsonl"}, steps=1)
    lines = (tmp_path / "tracker.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == [
        *("start", "text", "scalars", "scalars", "file", "finish"),
        *("resume", "text", "scalars", "file", "finish"),
    ]
    assert events[3] == {"event": "scalars", "step": 1, "values": {"loss": 0.5}}


def test_tensorboard_as_a_tracker(tmp_path: Path) -> None:
    setting = {"type": "tensorboard", "folder": str(tmp_path / "boards")}
    run(tmp_path, 0, setting, steps=3)
    run(tmp_path, 2, setting, steps=2)
    accumulator = EventAccumulator(str(tmp_path / "boards"))
    accumulator.Reload()
    losses = {event.step: event.value for event in accumulator.Scalars("loss")}
    assert losses == pytest.approx({step: 1 / (step + 1) for step in range(4)})
    assert b"hunter2pass" not in stored_bytes(tmp_path / "boards")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> TrackerRegistry:
    """Registry in which the test leaves nothing for others."""
    fresh = TrackerRegistry()
    monkeypatch.setattr(trackers, "custom_trackers", fresh)
    monkeypatch.setattr(group, "custom_trackers", fresh)
    return fresh


def test_a_registered_class_is_a_type(
    tmp_path: Path, registry: TrackerRegistry
) -> None:
    setting = {"type": "notes", "log": str(tmp_path / "log")}
    [unknown] = trackers.tracker_findings([setting])
    assert "register_tracker" in unknown.expected
    registry.register("notes")(RecordingTracker)
    assert list(trackers.tracker_findings([setting])) == []
    run(tmp_path, 0, setting)
    names = [call[0] for call in calls(tmp_path / "log")]
    assert names == ["start", "text", "scalars", "scalars", "file", "finish"]


def test_a_name_of_evomesh_cannot_be_registered(registry: TrackerRegistry) -> None:
    with pytest.raises(ValueError, match="register another name"):
        registry.register("jsonl")


def stored_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wandb", "swanlab"])
def test_real_packages_offline(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(kind, reason="needs the extra trackers")
    (tmp_path / "a.txt").write_text("a file")
    setting = {"type": kind, "project": "p", "mode": "offline"}
    run(tmp_path, 0, setting)
    ids = json.loads((tmp_path / "trackers.json").read_text())
    run(tmp_path, 2, setting, steps=1)
    assert "gets nothing more" not in caplog.text
    assert json.loads((tmp_path / "trackers.json").read_text()) == ids
    stored = stored_bytes(tmp_path)
    assert ids[kind].encode() in stored and b"loss" in stored
    assert b"hunter2pass" not in stored


@pytest.mark.slow
def test_real_mlflow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra trackers")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "a.txt").write_text("a file")
    uri = (tmp_path / "store").as_uri()
    setting = {"type": "mlflow", "tracking_uri": uri}
    run(tmp_path, 0, setting)
    run(tmp_path, 1, setting)  # resumed, with a step that comes again
    assert "gets nothing more" not in caplog.text, caplog.text
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("evomesh")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {point.step: point.value for point in history} == {0: 1, 1: 0.5, 2: 1 / 3}
    assert found.info.status == "FINISHED"
    assert found.data.params["adam.lr"] == "0.1"
    assert b"hunter2pass" not in stored_bytes(tmp_path / "store")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
