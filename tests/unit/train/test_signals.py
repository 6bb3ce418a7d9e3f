"""Signals before there is anything to save, while the main thread does something else, and in the last moments."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from evomesh.train.signals import (
    StopRequest,
    exit_code,
    signals_held_for_next_program,
)
from tests.support.interpreter import Interpreter

CODES = [
    (signal.SIGTERM, 75),
    (signal.SIGUSR1, 75),
    (signal.SIGHUP, 75),
    (signal.SIGINT, 130),
]


def wait_in_python() -> None:
    StopRequest().watch()
    print("ready", flush=True)
    while True:
        time.sleep(0.01)


def wait_outside_python() -> None:
    """As a rank waits in a collective: no Python bytecode runs in the main thread."""
    from torch.distributed import TCPStore

    StopRequest().watch()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print("ready", flush=True)
    store.wait(["a key that never comes"])


@pytest.mark.parametrize("wait", [wait_in_python, wait_outside_python])
@pytest.mark.parametrize(("number", "code"), CODES)
def test_before_the_first_step_a_signal_ends_the_process(
    interpreter: Interpreter, wait: Callable[[], None], number: int, code: int
) -> None:
    running = interpreter.start(wait)
    running.wait_for("ready")
    running.signal(number)
    finished = running.wait(60)
    assert finished.returncode == code
    name = signal.Signals(number).name
    assert (
        finished.stderr
        == f"stopped by {name} before the first step; rerun the same command\n"
    )


def record_and_finish() -> None:
    with StopRequest() as request:
        print("ready", flush=True)
        while request.signal is None:
            time.sleep(0.01)
        print(request.signal.name, request.exit_code, flush=True)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_later_a_signal_is_recorded_for_the_loop(
    interpreter: Interpreter, number: int, code: int
) -> None:
    running = interpreter.start(record_and_finish)
    running.wait_for("ready")
    running.signal(number)
    finished = running.wait(60)
    assert finished.returncode == 0
    assert finished.stdout == f"ready\n{signal.Signals(number).name} {code}\n"


def record_outside_python() -> None:
    from torch.distributed import TCPStore

    request = StopRequest()
    request.__enter__()

    def report() -> None:
        while request.signal is None:
            time.sleep(0.01)
        print(request.signal.name, flush=True)

    threading.Thread(target=report).start()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print("ready", flush=True)
    store.wait(["a key that never comes"])


def test_a_signal_is_recorded_while_the_main_thread_is_in_a_collective(
    interpreter: Interpreter,
) -> None:
    running = interpreter.start(record_outside_python)
    running.wait_for("ready")
    running.signal(signal.SIGTERM)
    running.wait_for("SIGTERM")


def ignore_hangup_then_wait() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    wait_in_python()


def test_nohup_outlives_its_terminal(interpreter: Interpreter) -> None:
    running = interpreter.start(ignore_hangup_then_wait)
    running.wait_for("ready")
    running.signal(signal.SIGHUP)
    running.signal(signal.SIGTERM)  # delivered after the first
    assert "SIGTERM" in running.wait(60).stderr


def stuck_after_ctrl_c() -> None:
    from evomesh.train import signals

    signals.SECOND_CTRL_C_S = 0.05
    with StopRequest():
        wait_outside_python()


def test_a_second_ctrl_c_ends_a_stuck_process(interpreter: Interpreter) -> None:
    running = interpreter.start(stuck_after_ctrl_c)
    running.wait_for("ready")
    for _ in range(40):
        running.signal(signal.SIGINT)
        time.sleep(0.02)
        if not running.is_alive:
            break
    assert running.wait(60).returncode == 130


NEXT_PROGRAM = """
import time
from evomesh.train.signals import StopRequest
StopRequest().watch()
time.sleep(60)
"""


def replace_program() -> None:
    """As a process that becomes torchrun: the signal comes between the two programs."""
    with signals_held_for_next_program():
        os.kill(os.getpid(), signal.SIGTERM)
        os.execv(sys.executable, [sys.executable, "-c", NEXT_PROGRAM])


def test_a_signal_between_two_programs_reaches_the_next(
    interpreter: Interpreter,
) -> None:
    finished = interpreter.run(replace_program)
    assert finished.returncode == 75
    assert "stopped by SIGTERM before the first step" in finished.stderr


def hand_over_a_signal() -> None:
    """As torch's agent takes signals, which passes them on to its ranks."""
    StopRequest().watch()
    heard = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: heard.set())
    print("ready", flush=True)
    while not heard.is_set():
        time.sleep(0.01)
    time.sleep(0.2)  # in which the background thread would end the process
    sys.exit(7)


def test_a_signal_that_another_has_taken_is_its_own(interpreter: Interpreter) -> None:
    running = interpreter.start(hand_over_a_signal)
    running.wait_for("ready")
    running.signal(signal.SIGTERM)
    assert running.wait(60).returncode == 7


def start_ranks() -> None:
    """As each of several supervisors that Slurm has started, one on a node."""
    os.environ.update(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2")
    request = StopRequest(is_rank=False).watch()
    request.before_end = lambda code, sentence: print("told", flush=True)
    print("ready", flush=True)
    time.sleep(60)


def test_who_is_no_rank_tells_no_rank(interpreter: Interpreter) -> None:
    running = interpreter.start(start_ranks)
    running.wait_for("ready")
    running.signal(signal.SIGTERM)
    finished = running.wait(60)
    assert (finished.returncode, finished.stdout) == (75, "ready\n")


def test_a_block_without_a_command_around_it_gives_the_signals_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert StopRequest.installed() is None
    with StopRequest() as request:
        assert StopRequest.installed() is request
    assert (
        signal.getsignal(signal.SIGTERM) == before and StopRequest.installed() is None
    )


def test_outside_the_main_thread_there_are_no_signals() -> None:
    entered = []

    def run() -> None:
        with StopRequest() as request:
            entered.append(request.signal)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert entered == [None]


def test_exit_codes() -> None:
    assert [exit_code(number) for number, _ in CODES] == [code for _, code in CODES]
