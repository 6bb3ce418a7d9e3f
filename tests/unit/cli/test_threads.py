"""Threads beside the main one: how OpenMP's wait for each other, and those that still compute when a command ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from evomesh.cli.run import SPIN_COUNT, WAIT_VARIABLES

PROGRAM = """
import os, sys
from evomesh.cli.run import run

def show():
    print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)

run(show)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, f"{SPIN_COUNT} None False"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None False"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE False"),
    ],
)
def test_threads_that_wait_sleep_soon(chosen: dict[str, str], expected: str) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in WAIT_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=True,
        env=kept | chosen,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.strip() == expected


COMPUTES_AT_THE_END = """
import atexit, sys, threading
from evomesh.cli.run import run

def command():
    import torch
    computes = threading.Event()

    def multiply():
        matrix = torch.ones(200, 200)
        while True:
            matrix @ matrix
            computes.set()

    threading.Thread(target=multiply, daemon=True).start()
    assert computes.wait(60)
    atexit.register(print, "exit function")
    print("output", end=", ")
    {ends}

run(command)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("", 0),
        ("sys.exit(75)", 75),
        ("raise RuntimeError('bug')", 1),
        ("raise KeyboardInterrupt", 130),
        ("raise OSError(2, 'No such file', 'x')", 2),
    ],
)
def test_a_thread_that_computes_does_not_change_the_exit_code(
    ends: str, code: int
) -> None:
    """Python would end it inside torch, and with it the process: by SIGABRT."""
    done = subprocess.run(
        [sys.executable, "-c", COMPUTES_AT_THE_END.format(ends=ends)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, "output, exit function\n")
    assert "terminate" not in done.stderr
