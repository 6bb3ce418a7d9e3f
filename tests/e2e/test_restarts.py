"""``evomesh run`` on real training: a killed run continues to the bit; two supervisors of one folder; SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.interpreter import Interpreter
from tests.support.runs import losses, write_run

ROOT = Path(__file__).parents[2]
COMMAND = ["evomesh", "run", "--restart-pause", "0", "config.py"]
# Killed once, in step 12: seven steps after the first checkpoint, two after the second.
KILLED_ONCE = """
import os, signal
from pathlib import Path
from evomesh.train import trainer
original = trainer.seed_step
def seed_step(seed, step, dp_rank):
    if step == 12 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    original(seed, step, dp_rank)
trainer.seed_step = seed_step
"""


def test_a_killed_run_continues_to_the_bit(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    fixed = 'run_dir = "run"\n'
    write_run(tmp_path / "killed", KILLED_ONCE + fixed)
    write_run(tmp_path / "alone", fixed)
    done = interpreter.run(COMMAND, cwd=tmp_path / "killed")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "the run ended killed by SIGKILL in step 12; restart 1 of at most 10"
        in done.stdout
    )
    alone = interpreter.run(["evomesh", "train", "config.py"], cwd=tmp_path / "alone")
    assert alone.returncode == 0
    assert losses(tmp_path / "killed/run") == losses(tmp_path / "alone/run")
    assert (
        "killed by SIGKILL in step 12"
        in (tmp_path / "killed/run/alerts.jsonl").read_text()
    )


def test_a_second_supervisor_is_refused_and_sigterm_ends_both(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    endless = 'data["total_steps"] = 100000\nckpt["checkpoint_every"] = 50\n'
    write_run(tmp_path, endless)
    first = interpreter.start(COMMAND, cwd=tmp_path)
    first.wait_for("checkpoint of step 50 committed")
    second = interpreter.run(COMMAND, cwd=tmp_path)
    assert second.returncode == 2
    assert (
        f"another supervisor runs this job: evomesh run, process {first.pid} on "
        in second.stderr
    )
    unsupervised = interpreter.run(["evomesh", "train", *COMMAND[-1:]], cwd=tmp_path)
    assert unsupervised.returncode == 2
    assert "another live job writes here" in unsupervised.stderr
    # Its refusal is no trouble of the run that lives, which has saved and so owns the run folder.
    assert "a restart resumes" not in unsupervised.stdout
    (alerts,) = tmp_path.glob("RUN/*/*/alerts.jsonl")
    assert "crash" not in alerts.read_text()
    first.signal(signal.SIGTERM)
    ended = first.wait(60)
    assert ended.returncode == 75, ended.stderr[-2000:]
    assert "stopped by SIGTERM" in ended.stdout
    assert "restart 1" not in ended.stdout


def test_a_signal_while_the_supervisor_starts(tmp_path: Path) -> None:
    write_run(tmp_path)
    command = [sys.executable, "-m", *COMMAND]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as supervisor:
        while not catches(supervisor.pid, signal.SIGTERM):
            time.sleep(0.005)
        supervisor.send_signal(signal.SIGTERM)
        _, printed = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 75
    assert "stopped by SIGTERM before the first step" in printed


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal, from /proc."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = re.findall(r"SigCgt:\s+(\w+)", status)
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("ckpt.enable_save_ckpt=False", "ckpt.save_ckpt_folder"),
        ("ckpt.auto_resume=False", "ckpt.auto_resume"),
        ("data.total_steps=-1", "data.total_steps"),
    ],
)
def test_what_no_restart_helps_is_refused_at_once(
    tmp_path: Path, interpreter: Interpreter, setting: str, key: str
) -> None:
    write_run(tmp_path)
    done = interpreter.run([*COMMAND, "--set", setting], cwd=tmp_path)
    assert done.returncode == 2
    assert key in done.stderr
