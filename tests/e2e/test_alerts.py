"""A run of two ranks tells a webhook of this machine about its start, a spike, its end, and its loss of a rank."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.runs import write_run
from tests.support.webhook import WebhookServer

# A learning rate that makes the loss jump, and then a channel that refuses everything.
CONFIG = """
data |= dict(total_steps=12, micro_num=1)
lr_scheduler |= dict(total_steps=12, warmup_ratio=0.0)
adam |= dict(lr=3.0)
monitor = dict(alert=dict(
    enable_feishu_alert=True, feishu_alert_address="env:MY_HOOK",
    channels=[dict(type="slack", url="{url}/slack/T0pSecret")],
))
"""


@covers("promise:alerts")
def test_start_spike_and_end_are_sent_once_for_all_ranks(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    with WebhookServer() as server:
        write_run(tmp_path, CONFIG.format(url=server.url))
        ranks = interpreter.start_ranks(
            ["evomesh", "train", "config.py"],
            2,
            cwd=tmp_path,
            env={"MY_HOOK": f"{server.url}/feishu", "SLURM_JOB_ID": "42"},
        )
        finished = [rank.wait(120) for rank in ranks]
        assert [one.returncode for one in finished] == [0, 0], finished
    posts = [
        document["content"]["post"]["zh_cn"]
        for path, document in server.received
        if path == "/feishu"
    ]
    assert [post["title"] for post in posts] == [
        "[42_tiny] started",
        "[42_tiny] loss spike",
        "[42_tiny] done",
    ]
    text = posts[0]["content"][0][0]["text"]
    assert text.startswith("2 ranks: ")
    output = "".join(one.stdout + one.stderr for one in finished)
    # Slack answers "ok": the other channel has failed, which is logged once.
    assert output.count("cannot send: the server did not answer ok") == 1
    assert "T0pSecret" not in output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    holders = [path.name for path in files if b"T0pSecret" in path.read_bytes()]
    assert holders == ["config.py"]


def test_a_killed_rank_is_one_alert(tmp_path: Path, interpreter: Interpreter) -> None:
    with WebhookServer() as server:
        more = "data |= dict(total_steps=2000, micro_num=1)\nlr_scheduler |= dict(total_steps=2000)\n"
        channel = f"[dict(type='webhook', url='{server.url}')]"
        write_run(tmp_path, more + "ckpt = dict(enable_save_ckpt=False)\n")
        command = ["evomesh", "train", "config.py"]
        command += ["--set", f"monitor.alert.channels={channel}"]
        ranks = interpreter.start_ranks(command, 3, cwd=tmp_path)
        ranks[0].wait_for("step=3,")
        ranks[1].signal(signal.SIGKILL)
        assert [rank.wait(120).returncode for rank in ranks] == [75, -9, 75]
    kinds = [document["kind"] for document in server.documents]
    assert kinds == ["started", "crash"]
    assert "rank 1 on " in server.documents[1]["text"]
    (path,) = tmp_path.glob("RUN/*/*/alerts.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == kinds
