"""The line between the inner loop and the rest: a test that starts another interpreter is slow, and marked so."""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def stays_in_this_process(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail a test that starts an interpreter without the mark: `make test-fast` would wait for its imports."""
    if request.node.get_closest_marker("slow"):
        return

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("this test starts a process: mark it with pytest.mark.slow")

    start_program = subprocess.Popen.__init__

    def start_no_interpreter(
        self: subprocess.Popen[Any], args: Any, *rest: Any, **options: Any
    ) -> None:
        program = args if isinstance(args, str) else os.fspath(args[0])
        if Path(program).parent == Path(sys.executable).parent:
            refuse()
        start_program(self, args, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", start_no_interpreter)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    monkeypatch.setattr(os, "fork", refuse)
