"""When a run is started again: small programs in place of training."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomesh.cli.restarts import is_first_of_job, train_arguments
from evomesh.errors import UserError
from evomesh.train.step_file import RunPosition, StepFile, read_position
from evomesh.train.supervisor import (
    FORWARDED,
    ExitHistory,
    RestartPolicy,
    RunExit,
    Supervisor,
    read_history,
)

pytestmark = pytest.mark.slow

# Takes the first line of the file "ends", which is "STEP CODE", and ends like that.
PROGRAM = """
import os, signal, sys
from pathlib import Path
step, code, *rest = Path("ends").read_text().split("\\n")[0].split()
lines = Path("ends").read_text().split("\\n")[1:]
Path("ends").write_text("\\n".join(lines))
if step != "-":
    file = os.open(os.environ["EVOMESH_STEP_FILE"], os.O_WRONLY | os.O_CREAT)
    os.write(file, f"{step:<20}\\n{os.getcwd()}/run\\n".encode())
if int(code) < 0:
    os.kill(os.getpid(), -int(code))
sys.exit(int(code))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    previous = {number: signal.getsignal(number) for number in FORWARDED}
    yield tmp_path
    for number, handler in previous.items():
        signal.signal(number, handler)


def supervise(
    folder: Path, *ends: str, max_restarts: int = 10, said: list[str] | None = None
) -> int:
    (folder / "ends").write_text("\n".join(ends))
    texts: list[str] = [] if said is None else said
    supervisor = Supervisor(
        [sys.executable, "-S", "-c", PROGRAM],
        RestartPolicy(max_restarts, first_pause_s=0.0),
        report=lambda text, position: texts.append(text),
    )
    return supervisor.run()


def left(folder: Path) -> list[str]:
    """The starts that were not made."""
    return [line for line in (folder / "ends").read_text().split("\n") if line]


@pytest.mark.parametrize("code", [75, 1, -signal.SIGKILL, -signal.SIGBUS, 137])
def test_what_a_restart_can_cure_is_started_again(folder: Path, code: int) -> None:
    assert supervise(folder, f"3 {code}", "9 0", "10 0") == 0
    assert left(folder) == ["10 0"]
    rows = (folder / "run/exits.jsonl").read_text().splitlines()
    kept = [json.loads(row) for row in rows]
    assert [(row["code"], row["step"], row["restart"]) for row in kept] == [
        (code, 3, 0),
        (0, 9, 1),
    ]


@pytest.mark.parametrize("code", [0, 2, 6, 130])
def test_what_no_restart_can_cure_is_not(folder: Path, code: int) -> None:
    assert supervise(folder, f"3 {code}", "9 0") == code
    assert left(folder) == ["9 0"]


def test_two_crashes_in_one_step_end_it_with_a_sentence(folder: Path) -> None:
    said: list[str] = []
    # Between them one that did not get to a step.
    with pytest.raises(
        UserError, match="ended twice in step 7, the last time"
    ) as error:
        supervise(folder, "7 -9", "- 75", "7 1", "9 0", said=said)
    assert error.value.exit_code == 1
    assert left(folder) == ["9 0"]
    assert said == [
        "the run was killed by SIGKILL in step 7",
        "not started again: the run ended twice in step 7, the last time with exit code 1 in step 7",
    ]


def test_an_earlier_supervisors_crash_counts(folder: Path) -> None:
    with pytest.raises(UserError, match="after 0 restarts"):
        supervise(folder, "7 75", max_restarts=0)
    with pytest.raises(UserError, match="twice in step 7"):
        supervise(folder, "7 75", "9 0")


def test_a_complete_run_clears_the_record(folder: Path) -> None:
    history = ExitHistory()
    for code, step in ((75, 7), (0, 9), (75, 7)):
        history.add(RunExit(0.0, code, step, 0), None)
    assert not history.repeats_step()


def test_restarts_are_counted(folder: Path) -> None:
    with pytest.raises(UserError, match="after 2 restarts"):
        supervise(folder, "1 75", "2 75", "3 75", "4 0", max_restarts=2)
    assert left(folder) == ["4 0"]


def test_pauses_grow_up_to_five_minutes() -> None:
    policy = RestartPolicy(first_pause_s=5.0)
    assert [policy.pause_s(n) for n in (1, 2, 3, 8)] == [5.0, 10.0, 20.0, 300.0]


def test_pauses_begin_anew_when_the_run_gets_further(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    pauses: list[float] = []

    def start(restarts: int) -> tuple[int, RunPosition]:
        pauses.append(clock[0])
        clock[0] = 0.0
        code, step = ends.pop(0)
        return code, RunPosition(step, None)

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    # Before a step, in step 3, before a step again, in step 7, and complete.
    ends = [(75, None), (75, 3), (75, None), (75, 7), (0, 9)]
    supervisor = Supervisor(["unused"], RestartPolicy(10, first_pause_s=5.0))
    monkeypatch.setattr(supervisor, "_run_once", start)
    monkeypatch.setattr("evomesh.train.supervisor.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("evomesh.train.supervisor.time.sleep", sleep)
    assert supervisor.run() == 0
    assert pauses == pytest.approx([0.0, 5.0, 5.0, 10.0, 5.0], abs=0.2)


SLEEPER = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    Path("got").write_text(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, stop)
Path("ready").touch()
time.sleep(100)
"""


def signal_when_ready(folder: Path, number: signal.Signals) -> None:
    """Send a signal to this process once the run has written the file ``ready``."""

    def send() -> None:
        while not (folder / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_ends_both(
    folder: Path, number: signal.Signals
) -> None:
    signal_when_ready(folder, number)
    command = [sys.executable, "-S", "-c", SLEEPER]
    assert Supervisor(command, RestartPolicy()).run() == 75
    assert (folder / "got").read_text() == number.name


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_signal_that_a_run_has_no_handlers_for_yet_ends_with_its_code(
    folder: Path, number: signal.Signals, code: int
) -> None:
    signal_when_ready(folder, number)
    command = ["sh", "-c", "touch ready; exec sleep 100"]
    assert Supervisor(command, RestartPolicy()).run() == code


def test_only_the_first_rank_of_a_node_writes_the_step(tmp_path: Path) -> None:
    path = tmp_path / "step"
    env = {"EVOMESH_STEP_FILE": str(path)}
    assert read_position(path) == RunPosition()
    assert StepFile.of_this_process({}) is None
    assert StepFile.of_this_process(env | {"LOCAL_RANK": "1"}) is None
    alone = {"LOCAL_RANK": "1", "EVOMESH_SUPERVISOR": str(os.getppid())}
    assert StepFile.of_this_process(env | alone) is not None
    file = StepFile.of_this_process(env | {"LOCAL_RANK": "0"})
    assert file is not None
    for step in (99_999, 5):
        file.write(step, tmp_path)
    assert read_position(path) == RunPosition(5, tmp_path)


def test_a_step_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The supervisor's folder was cleared with other temporary files."""
    file = StepFile(str(tmp_path / "gone/step"))
    for step in range(3):
        file.write(step, tmp_path)
    (warning,) = caplog.messages
    assert "cannot write the supervisor's step file" in warning
    (tmp_path / "gone").mkdir()
    file.write(3, tmp_path)
    assert read_position(tmp_path / "gone/step") == RunPosition(3, tmp_path)


def test_a_damaged_history_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "exits.jsonl"
    good = RunExit(1.0, 75, 3, 0)
    row = json.dumps(vars(good))
    path.write_text(f'{row}\n{{"code": 1}}\nhalf a li')
    assert read_history(path) == [good]


def test_the_options_of_the_supervisor_are_kept_from_the_run() -> None:
    words = ["evomesh", "--debug", "run", "--max-restarts", "3", "c.py", "--nproc=2"]
    words += ["--set", "data.total_steps=3", "--restart-pause=1", "--seed", "4"]
    assert train_arguments(words) == [
        "c.py", "--set", "data.total_steps=3", "--seed", "4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("env", "first"),
    [
        ({}, True),
        ({"RANK": "0", "NODE_RANK": "0"}, True),
        ({"RANK": "3"}, False),
        ({"SLURM_PROCID": "1"}, False),
        ({"NODE_RANK": "1"}, False),
    ],
)
def test_one_supervisor_of_a_job_speaks_for_it(
    env: dict[str, str], first: bool
) -> None:
    assert is_first_of_job(env) == first
