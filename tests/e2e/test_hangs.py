"""Ranks that hang in real runs, one of each kind; benchmarks/hangs.py has hundreds."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from evomesh.config.loader import load_config
from tests.support.covers import covers
from tests.support.hang_faults import WORDS
from tests.support.interpreter import Finished, Interpreter
from tests.support.runs import metrics, write_run

HOST = socket.gethostname()
QUICK = (
    'data["total_steps"] = 100000\nckpt["checkpoint_every"] = 4\n'
    "from evomesh.parallel import hang_watch\nhang_watch.START_S = hang_watch.BEAT_S\n"
    "monitor = dict(watchdog=dict(silence=1.5, steps=2, long_phase=1.5))\n"
)
# Kind -> (ranks, the one that hangs, settings)
CASES = {
    "stopped": (2, 0, "hang_watch.NEXT_START_S = 0.0\n"),
    "stopped while it starts the watcher": (
        2,
        0,
        "hang_watch.NEXT_START_S = hang_watch.BEAT_S\n",
    ),
    "endless loop in C": (2, 1, "parallel = dict(tensor=2)\n"),
    "endless loop in Python": (1, 0, ""),
    "skipped collective": (2, 0, ""),
    "other order": (2, 1, ""),
    "file system": (1, 0, ""),
    "dead data worker": (1, 0, ""),
}


def run(interpreter: Interpreter, folder: Path, kind: str) -> list[Finished]:
    ranks, culprit, settings = CASES[kind]
    plant = f"from tests.support.hang_faults import plant\nplant({kind!r}, rank={culprit}, step=3)\n"
    write_run(folder, QUICK + settings + plant)
    started = interpreter.start_ranks(
        ["evomesh", "train", "config.py"], ranks, cwd=folder
    )
    return [rank.wait(100) for rank in started]


@covers("monitor.watchdog.silence", "monitor.watchdog.long_phase")
@pytest.mark.parametrize("kind", CASES)
def test_a_hang_is_explained_once_and_ends_the_run(
    tmp_path: Path, interpreter: Interpreter, kind: str
) -> None:
    ranks, culprit, _ = CASES[kind]
    finished = run(interpreter, tmp_path, kind)
    text = "".join(one.stdout + one.stderr for one in finished)
    assert f"rank {culprit} on {HOST} (pid " in text, text[-3000:]
    assert WORDS[kind] in text, text[-3000:]
    assert text.count("ending with exit code 75") == 1
    assert "Traceback" not in text
    for rank, one in enumerate(finished):
        # What is stopped or holds Python's lock cannot end by itself.
        expected = {75, -signal.SIGKILL} if rank == culprit else {75}
        assert one.returncode in expected
    if "loop" in kind:
        assert "hang_faults.py" in text  # the stack
    if ranks == 2 and "loop" in kind:
        assert "waiting for it: rank 0 in " in text


@covers("monitor.watchdog.enable")
def test_without_a_watchdog_there_is_no_record(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    off = 'data["total_steps"] = 2\nmonitor = dict(watchdog=dict(enable=False))\n'
    probe = (
        "from evomesh.watchdog.activity import Activity\n"
        "def refuse(*arguments): raise AssertionError('opened')\n"
        "Activity.open = refuse\n"
    )
    write_run(tmp_path, off + probe)
    done = interpreter.run(["evomesh", "train", "config.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(metrics(tmp_path)) == 2


@covers("monitor.watchdog.steps")
def test_the_limits_of_the_config_are_those_of_the_watchdog(tmp_path: Path) -> None:
    from evomesh.train.launch import hang_limits

    write_run(tmp_path, "monitor = dict(watchdog=dict(silence=4.0, steps=2.5))\n")
    limits = hang_limits(load_config(tmp_path / "config.py").config)
    assert limits.of_a_step(1.0) == 4.0
    assert limits.of_a_step(2.0) == 5.0
