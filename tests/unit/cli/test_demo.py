"""``evomesh demo``: its folder, the length of a short run, and a training that is stopped or fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evomesh.cli import demo
from evomesh.cli.config import shipped_configs
from evomesh.cli.demo import _enter, _length, run_until_its_end
from evomesh.config.loader import load_config
from evomesh.errors import UserError

# Waits for a signal, and ends with its number.
CHILD = """
import signal, sys
def end(number, frame):
    sys.exit(number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
print("ready", flush=True)
signal.pause()
"""
PARENT = """
import signal, sys
from evomesh.cli.demo import run_until_its_end
code = run_until_its_end([sys.executable, "-c", sys.argv[1]])
restored = signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(code, restored)
"""


def test_the_folder_gets_the_configs_and_keeps_edited_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edited = tmp_path / "a" / "configs" / "demo.py"
    edited.parent.mkdir(parents=True)
    edited.write_text("seed = 1\n")
    _enter(Path("a"))
    assert Path.cwd() == tmp_path / "a"
    assert edited.read_text() == "seed = 1\n"
    (shipped,) = [path for path in shipped_configs() if path.stem == "demo_chat"]
    assert (edited.parent / "demo_chat.py").read_bytes() == shipped.read_bytes()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"file: cannot be written"):
        _enter(file)


def test_the_chat_of_a_short_run_has_as_large_a_share_of_the_steps_as_in_the_configs() -> (
    None
):
    known = {path.stem: str(path) for path in shipped_configs()}
    steps, chat_steps = (
        load_config(known[name]).config.data.total_steps for name in demo.CONFIGS
    )
    assert steps == demo.STEPS_PER_CHAT_STEP * chat_steps
    assert "data.total_steps=20" in _length("demo", 20)
    assert "lr_scheduler.total_steps=4" in _length("demo_chat", 20)
    assert "ckpt.checkpoint_every=1" in _length("demo_chat", 1)
    assert _length("demo", None) == []


def test_a_run_that_is_refused_points_to_another_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_until_its_end", lambda command: 2)
    for has_run in (False, True):
        if has_run:
            (tmp_path / demo.CHECKPOINTS).mkdir(parents=True)
        with pytest.raises(SystemExit) as ended:
            demo._train("demo", [])
        assert ended.value.code == 2
        assert ("evomesh demo FOLDER" in capsys.readouterr().err) == has_run


@pytest.mark.slow
def test_the_exit_code_is_that_of_the_training() -> None:
    command = [sys.executable, "-S", "-c"]
    assert run_until_its_end([*command, "raise SystemExit(6)"]) == 6
    killed = "import os; os.kill(os.getpid(), 9)"
    assert run_until_its_end([*command, killed]) == 128 + 9


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_training_once(number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    # As a terminal does: to all processes of the group, of which the training is none.
    os.killpg(parent.pid, number)
    assert parent.stdout.readline() == f"{int(number)} True\n"
    assert parent.wait() == 0
