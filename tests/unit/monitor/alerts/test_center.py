"""AlertCenter: rate limit, background sending, failures, the end of a run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evomesh.config.alert import AlertConfig
from evomesh.config.redact import REDACTED
from evomesh.monitor.alerts.alert import Alert
from evomesh.monitor.alerts.center import AlertCenter
from evomesh.monitor.alerts.files import ALERTS_FILE
from evomesh.monitor.alerts.http import DeliveryError
from evomesh.monitor.alerts.sender import BackgroundSender
from tests.support.covers import covers
from tests.support.webhook import WebhookServer


class Inbox:
    """A channel that keeps what it gets; ``errors`` are raised first."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.attempts = 0
        self.alerts: list[Alert] = []

    def send(self, alert: Alert) -> None:
        self.attempts += 1
        if self.errors:
            raise self.errors.pop(0)
        self.alerts.append(alert)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@covers("monitor.alert.min_interval")
def test_one_alert_of_a_kind_per_interval_and_a_count_of_the_others() -> None:
    inbox, clock = Inbox(), Clock()
    center = AlertCenter({"inbox": inbox}, "job", min_interval=60, clock=clock)
    for _ in range(4):
        center.raise_alert("loss spike", "up")
    center.raise_alert("slow rank", "rank 1")  # another kind has its own interval
    clock.now += 60
    center.raise_alert("loss spike", "up again")
    center.raise_alert("slow rank", "rank 1")
    center.raise_alert("slow rank", "rank 1")
    center.raise_alert("done", "all steps")
    center.close()
    assert [(alert.kind, dict(alert.suppressed)) for alert in inbox.alerts] == [
        ("loss spike", {}),
        ("slow rank", {}),
        ("loss spike", {"loss spike": 3}),
        ("slow rank", {}),
        ("done", {"slow rank": 1}),
    ]


def test_a_run_folder_that_is_opened_again_gets_each_alert_once(tmp_path: Path) -> None:
    center = AlertCenter.open(AlertConfig(), "job")
    for _ in range(3):  # as after rollbacks
        center.write_to(tmp_path)
    center.raise_alert("done", "all steps")
    center.close(5)
    assert len((tmp_path / ALERTS_FILE).read_text().splitlines()) == 1


def test_start_and_end_are_never_suppressed() -> None:
    inbox = Inbox()
    center = AlertCenter({"inbox": inbox}, "job", clock=Clock())
    for kind in ("started", "started", "crash", "crash"):
        center.raise_alert(kind, "text")
    center.close()
    assert len(inbox.alerts) == 4


def test_a_slow_receiver_blocks_neither_the_caller_nor_the_others_nor_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inbox = Inbox()
    never = threading.Event()
    arrived = threading.Event()

    class Stuck:
        def send(self, alert: Alert) -> None:
            arrived.set()
            never.wait()

    center = AlertCenter({"stuck": Stuck(), "inbox": inbox}, "job", min_interval=0)
    for number in range(200):  # more than the queue holds
        center.raise_alert("loss spike", str(number))
        arrived.wait()
    center.close(timeout=0.2)
    assert inbox.alerts[-1].text == "199"
    assert "stuck: 65 not sent before the end" in caplog.text
    never.set()


def test_a_full_queue_loses_the_oldest() -> None:
    gate = threading.Event()
    started = threading.Event()
    sent: list[int] = []

    def send(item: int) -> None:
        started.set()
        gate.wait()
        sent.append(item)

    sender = BackgroundSender[int]("x", send, capacity=2)
    sender.put(0)
    started.wait()
    for item in range(1, 6):
        sender.put(item)
    gate.set()
    sender.close(time.monotonic() + 10)
    assert sent == [0, 4, 5]


@pytest.mark.parametrize(
    ("errors", "attempts", "arrives"),
    [
        ([ConnectionResetError()], 2, True),
        ([DeliveryError("500"), OSError(5, "Input/output error")], 3, True),
        ([DeliveryError("500")] * 3, 3, False),
        ([DeliveryError("404", is_final=True)], 1, False),
        ([ValueError("T0pSecret")], 1, False),
    ],
)
def test_what_may_arrive_later_is_tried_again(
    errors: list[Exception],
    attempts: int,
    arrives: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inbox = Inbox(*errors)
    sender = BackgroundSender[Alert]("inbox", inbox.send, pauses=(0.0, 0.0))
    sender.put(Alert("done", "", "", "", "", {}))
    deadline = time.monotonic() + 10
    while not inbox.alerts and inbox.attempts < attempts:
        assert time.monotonic() < deadline
    sender.close(deadline)
    assert inbox.attempts == attempts
    assert bool(inbox.alerts) == arrives
    assert len(caplog.records) == int(not arrives)
    assert "T0pSecret" not in caplog.text


def test_a_failing_receiver_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    errors = [DeliveryError("the server answered 404", is_final=True)] * 5
    center = AlertCenter({"channels[0] (slack)": Inbox(*errors)}, "j", min_interval=0)
    for _ in range(5):
        center.raise_alert("loss spike", "up")
    center.close()
    (message,) = caplog.messages
    assert "channels[0] (slack): cannot send: the server answered 404" in message
    assert "training continues" in message


def test_secrets_in_the_text_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "Canary7x9Qz")
    inbox = Inbox()
    center = AlertCenter({"inbox": inbox}, "run Canary7x9Qz")
    center.raise_alert("crash", "no access with Canary7x9Qz\x1b[2J")
    center.close()
    (alert,) = inbox.alerts
    assert alert.text == rf"no access with {REDACTED}\x1b[2J"
    assert "Canary" not in alert.title


@covers(
    "monitor.alert.enable_feishu_alert",
    "monitor.alert.feishu_alert_address",
    "monitor.alert.alert_file_path",
    "monitor.alert.channels",
)
def test_every_receiver_of_a_config_gets_the_alert(tmp_path: Path) -> None:
    with WebhookServer() as server:
        config = AlertConfig(
            enable_feishu_alert=True,
            feishu_alert_address=f"{server.url}/feishu",
            alert_file_path=str(tmp_path / "folder/alerts.txt"),
            channels=({"type": "webhook", "url": "env:MY_HOOK"},),
        )
        environment = {"MY_HOOK": f"{server.url}/hook", "SLURM_JOB_ID": "7"}
        center = AlertCenter.open(config, "tiny", environment)
        center.write_to(tmp_path)
        center.raise_alert("hang", "rank 2 waits")
        center.close()
    assert sorted(path for path, _ in server.received) == ["/feishu", "/hook"]
    text = (tmp_path / "folder/alerts.txt").read_text()
    assert text.startswith("[7_tiny] hang\nrank 2 waits\n")
    (line,) = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == "rank 2 waits"


def test_beside_a_run_a_hidden_secret_leaves_out_its_channel_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A supervisor has the config of a checkpoint, in which secrets are hidden."""
    with WebhookServer() as server:
        config = AlertConfig(
            channels=(
                {"type": "slack", "url": REDACTED},
                {"type": "webhook", "url": "env:MY_HOOK"},
            )
        )
        center = AlertCenter.beside_run(config, "t", tmp_path, {"MY_HOOK": server.url})
        center.raise_alert("hang", "rank 2 waits")
        center.close()
    assert len(server.received) == 1
    assert len(caplog.records) == 1
    assert "channels[0] (slack)" in caplog.text


@pytest.mark.slow
def test_alerts_do_not_import_torch() -> None:
    code = "import sys, evomesh.monitor.alerts.center; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
