"""How OpenMP's threads wait for each other: set before torch is loaded, and never against the user's choice."""

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
