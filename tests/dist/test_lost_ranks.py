"""A rank that is killed, frozen, stopped or fails, in real training jobs: the others end with one code and name it."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.support.interpreter import Interpreter, Running
from tests.support.runs import write_run

HOST = socket.gethostname()
ENDLESS = 'data["total_steps"] = 100000\nckpt["checkpoint_every"] = 100000\n'
QUICK = "from evomesh.parallel import peer_watch\npeer_watch.SILENT_S, peer_watch.LOST_S = 3.0, 4.0\n"
LAYOUTS = {
    "data": "",
    "tensor": "parallel = dict(tensor=2)\n",
    "pipeline": "parallel = dict(pipeline=2)\n",
    "weight": 'parallel = dict(tensor=dict(size=2, mode="isp"), weight=2)\n',
}


def start(
    interpreter: Interpreter, folder: Path, ranks: int, extra: str
) -> list[Running]:
    write_run(folder, QUICK + ENDLESS + extra)
    return interpreter.start_ranks(["evomesh", "train", "config.py"], ranks, cwd=folder)


def wait_for_step(ranks: list[Running]) -> None:
    """Wait for the rank that prints the steps: the first of the last pipeline stage."""
    deadline = time.monotonic() + 60
    while not any("step=2," in rank.stdout for rank in ranks):
        assert all(rank.is_alive for rank in ranks), ranks[0].stderr[-3000:]
        assert time.monotonic() < deadline, ranks[0].stderr[-3000:]
        time.sleep(0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named_by_the_other(
    tmp_path: Path, interpreter: Interpreter, layout: str, lost: int
) -> None:
    ranks = start(interpreter, tmp_path, 2, LAYOUTS[layout])
    wait_for_step(ranks)
    ranks[lost].signal(signal.SIGKILL)
    finished = ranks[1 - lost].wait(60)
    assert finished.returncode == 75, finished.stderr[-3000:]
    assert f"rank {lost} on {HOST} is lost" in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stdout + finished.stderr


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_frozen_rank_is_named_and_the_others_end(
    tmp_path: Path, interpreter: Interpreter, frozen: int
) -> None:
    ranks = start(interpreter, tmp_path, 3, "")
    wait_for_step(ranks)
    ranks[frozen].signal(signal.SIGSTOP)
    for number, rank in enumerate(ranks):
        if number != frozen:
            finished = rank.wait(60)
            assert finished.returncode == 75, finished.stderr[-3000:]
            assert f"rank {frozen} on {HOST}" in finished.stdout + finished.stderr
            assert "Traceback" not in finished.stdout + finished.stderr
    ranks[frozen].signal(signal.SIGCONT)
    assert ranks[frozen].wait(60).returncode == 75


def test_a_frozen_rank_does_not_delay_sigterm(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    patient = "peer_watch.LOST_S = 1e6\n"
    ranks = start(interpreter, tmp_path, 3, patient)
    wait_for_step(ranks)
    ranks[2].signal(signal.SIGSTOP)
    for rank in ranks[:2]:
        rank.signal(signal.SIGTERM)
    assert [rank.wait(60).returncode for rank in ranks[:2]] == [75, 75]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)],
)
def test_a_signal_to_one_rank_before_they_meet_ends_all(
    tmp_path: Path, interpreter: Interpreter, number: int, code: int
) -> None:
    write_run(tmp_path, QUICK + ENDLESS)
    slow = "import os, time\nprint('loading', flush=True)\ntime.sleep(60 * (os.environ['RANK'] == '1'))\n"
    (tmp_path / "config.py").write_text((tmp_path / "config.py").read_text() + slow)
    ranks = interpreter.start_ranks(["evomesh", "train", "config.py"], 2, cwd=tmp_path)
    ranks[1].wait_for("loading")
    ranks[1].signal(number)
    finished = [rank.wait(50) for rank in ranks]
    assert [one.returncode for one in finished] == [code, code], finished[0].stderr[
        -2000:
    ]
    assert (
        f"rank 1 on {HOST} ended: stopped by {signal.Signals(number).name}"
        in finished[0].stderr
    )


def test_the_same_error_is_printed_by_one_rank_only(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    for number, option in enumerate(
        ("data.train_folder=nowhere", "model.hidden_size=33")
    ):
        folder = tmp_path / str(number)
        write_run(folder)
        command = ["evomesh", "train", "config.py", "--set", option]
        finished = [
            rank.wait(60) for rank in interpreter.start_ranks(command, 3, cwd=folder)
        ]
        assert [one.returncode for one in finished] == [2, 2, 2]
        text = "".join(one.stdout + one.stderr for one in finished)
        assert text.count("error: ") == 1, text
        assert "Traceback" not in text


def test_an_error_of_one_rank_is_everybodys(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    only_one = (
        'import os\nrun_dir = "taken/here" if os.environ["RANK"] == "1" else None\n'
    )
    write_run(tmp_path, only_one)
    (tmp_path / "taken").touch()
    ranks = interpreter.start_ranks(["evomesh", "train", "config.py"], 3, cwd=tmp_path)
    finished = [rank.wait(60) for rank in ranks]
    assert [one.returncode for one in finished] == [2, 2, 2], finished[0].stderr[-2000:]
    assert "error: run_dir (taken/here): " in finished[1].stderr
    for other in (finished[0], finished[2]):
        assert (
            f"rank 1 on {HOST} ended: run_dir (taken/here)"
            in other.stdout + other.stderr
        )


def test_ranks_with_other_configs_do_not_train(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(
        tmp_path, 'import os\nadam["lr"] = 1e-3 * (1 + int(os.environ["RANK"]))\n'
    )
    ranks = interpreter.start_ranks(["evomesh", "train", "config.py"], 2, cwd=tmp_path)
    finished = [rank.wait(60) for rank in ranks]
    assert [one.returncode for one in finished] == [2, 2]
    text = "".join(one.stderr for one in finished)
    assert (
        f"adam.lr differs: 0.001 (rank 0 on {HOST}), 0.002 (rank 1 on {HOST})" in text
    )
    assert "step=0," not in "".join(one.stdout for one in finished)


def test_ranks_with_other_data_do_not_train(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(
        tmp_path,
        'import os\nif os.environ["RANK"] == "1":\n    data["train_folder"] = "data/valid"\n',
    )
    ranks = interpreter.start_ranks(["evomesh", "train", "config.py"], 2, cwd=tmp_path)
    finished = [rank.wait(60) for rank in ranks]
    assert [one.returncode for one in finished] == [2, 2]
    assert "data file code/data.bin differs: " in "".join(
        one.stderr for one in finished
    )


def test_torchrun_finds_the_error_in_its_file(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    import json

    write_run(tmp_path)
    environment = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    command = ["evomesh", "train", "config.py", "--set", "data.train_folder=nowhere"]
    assert interpreter.run(command, cwd=tmp_path, env=environment).returncode == 2
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert (
        "nowhere" in message["message"]
        and "nowhere" in message["extraInfo"]["py_callstack"]
    )
    assert int(message["extraInfo"]["timestamp"]) > 0
