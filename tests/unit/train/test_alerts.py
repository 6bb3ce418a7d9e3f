"""TrainingAlerts: which events of a run are alerts, and which rank raises them."""

from __future__ import annotations

import shutil
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from evomesh.config.alert import AlertConfig, MonitorConfig
from evomesh.config.schema import Config
from evomesh.config.spike import SpikeConfig
from evomesh.errors import UserError
from evomesh.monitor.alerts.alert import Alert
from evomesh.monitor.alerts.center import AlertCenter
from evomesh.monitor.metrics import StepRecord
from evomesh.train.alerts import TrainingAlerts
from evomesh.train.spikes import SpikeWatch
from tests.support.covers import covers
from tests.support.webhook import WebhookServer

STARTED = datetime(2026, 1, 31, 12)


def record(step: int = 0, loss: float = 2.0, grad_norm: float = 1.0) -> StepRecord:
    return StepRecord(
        1.0, step, loss, 9.5, 1e-3, 1.0, grad_norm, 1, 10, 2, 1, 1, 1, 1, 0.9, 0.1
    )


class Listener:
    def __init__(self) -> None:
        self.alerts: list[Alert] = []

    def send(self, alert: Alert) -> None:
        self.alerts.append(alert)

    @property
    def kinds(self) -> list[str]:
        return [alert.kind for alert in self.alerts]


def make(
    rank: int = 0, folder: Path | None = None, **alert: object
) -> tuple[TrainingAlerts, Listener]:
    config = Config(monitor=MonitorConfig(alert=AlertConfig(**alert)))
    listener = Listener()
    alerts = TrainingAlerts(config, rank, AlertCenter({"x": listener}, "job"))
    if folder is not None:
        (folder / "logs").mkdir(exist_ok=True)
        alerts.attach(folder, rank == 0, STARTED, saves_to=None)
    return alerts, listener


def test_a_spike_and_a_gradient_that_is_not_finite_are_alerts() -> None:
    alerts, listener = make(min_free_gb=0.0)
    with alerts:
        for step in range(5):
            alerts.after_step(record(step))
        alerts.after_step(record(5, loss=3.5))
        alerts.after_step(record(6, loss=float("nan")))
    assert listener.kinds == ["loss spike", "not finite"]
    assert listener.alerts[0].text == (
        "the loss of step 5 is 3.5000, and its running mean was 2.0000"
    )
    assert "step 6: loss nan" in listener.alerts[1].text
    assert "skipped steps so far: 2" in listener.alerts[1].text


def test_what_is_done_about_a_spike_is_in_its_alert() -> None:
    alerts, listener = make(min_free_gb=0.0, min_interval=0.0)
    watch = SpikeWatch(SpikeConfig(policy="skip", min_steps=3))
    with alerts:
        for step, loss in enumerate([2.0, 2.0, 2.0, 2.5, float("nan")]):
            finding = watch.after_step(step, loss, 1.0, applied=step < 3)
            alerts.after_step(record(step, loss=loss), spike=finding)
    # Far below 1.5 times the mean; a loss that is not finite has one alert.
    assert listener.kinds == ["loss spike", "not finite"]
    assert "step 3 is a spike: loss 2.5, 25.0 deviations" in listener.alerts[0].text
    assert listener.alerts[0].text.endswith("its packs are not used")


def test_only_the_main_rank_raises_them(tmp_path: Path) -> None:
    alerts, listener = make(rank=1, folder=tmp_path)
    with alerts:
        alerts.began("from scratch", resumed=False, world_size=2)
        alerts.after_step(record(loss=float("inf")))
        alerts.raise_alert("done", "all")
    assert listener.alerts == []


def test_a_crash_is_one_alert_of_the_job(tmp_path: Path) -> None:
    """Whichever rank comes first; each start of the run may crash again."""
    listeners = []
    for started in (STARTED, STARTED, datetime(2026, 1, 31, 13)):
        for rank in (2, 0):
            alerts, listener = make(rank=rank, folder=tmp_path)
            alerts.attach(tmp_path, rank == 0, started, saves_to=None)
            with pytest.raises(UserError), alerts:
                raise UserError("the disk is full", fix="free space")
            listeners.append(listener)
    assert [len(listener.alerts) for listener in listeners] == [1, 0, 0, 0, 1, 0]
    text = listeners[0].alerts[0].text
    assert text == "rank 2: the disk is full\n  fix: free space"


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (1, 0)])
def test_before_there_is_a_run_folder_rank_0_reports_a_crash(
    rank: int, count: int
) -> None:
    alerts, listener = make(rank=rank)
    with pytest.raises(ZeroDivisionError), alerts:
        1 / 0
    assert len(listener.alerts) == count
    if count:
        assert "ZeroDivisionError: division by zero" in listener.alerts[0].text


def test_ctrl_c_is_not_an_alert() -> None:
    alerts, listener = make()
    with pytest.raises(KeyboardInterrupt), alerts:
        raise KeyboardInterrupt
    assert listener.alerts == []


@covers("monitor.alert.min_free_gb")
@pytest.mark.parametrize(
    ("free", "bytes_per_save", "is_full"),
    [
        (2.9e9, 0, True),
        (3.1e9, 0, False),
        (3.1e9, int(1.5e9), False),
        (3.1e9, int(1.6e9), True),
    ],
)
def test_a_disk_without_room_for_two_checkpoints_is_nearly_full(
    free: float,
    bytes_per_save: int,
    is_full: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = SimpleNamespace(free=int(free), total=int(9e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    alerts, listener = make(folder=tmp_path, min_free_gb=3.0)
    with alerts:
        for step in range(3):
            alerts.after_step(record(step), bytes_per_save)
        alerts._disks._checks.close(time.monotonic() + 10)
    assert listener.kinds == ["disk nearly full"] * is_full


@covers("monitor.alert.light_monitor_address")
def test_heartbeats_have_the_form_of_the_light_monitor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLUSTER_NAME", "moon")
    with WebhookServer() as server:
        alerts, _ = make(light_monitor_address=server.url)
        with alerts:
            for step in range(60):
                alerts.after_step(record(step, grad_norm=float("inf")))
                if step == 0:
                    server.arrived.acquire()
    assert [document["step"] for document in server.documents] == [0, 50]
    document = server.documents[0]
    assert document["tgs"] == 9.5  # from "tgs (tokens/gpu/second)"
    assert document["grad_norm"] is None
    assert document["cluster"] == "moon"
    assert document["msg_type"] == "train_metrics"


def test_a_heartbeat_that_is_refused_is_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with WebhookServer((500, b"")) as server:
        alerts, _ = make(light_monitor_address=f"{server.url}/T0pSecret")
        with alerts:
            for step in range(120):
                alerts.after_step(record(step))
                if step % 50 == 0:
                    server.arrived.acquire()
    (message,) = caplog.messages
    assert message.startswith("monitor.alert.light_monitor_address: cannot send: the ")
    assert "answered 500" in message
    assert "T0pSecret" not in message
