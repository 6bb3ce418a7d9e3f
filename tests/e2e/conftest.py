"""What several files of end-to-end tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support.interpreter import Interpreter

Run = Callable[..., str]


@pytest.fixture(scope="session")
def run(interpreter: Interpreter) -> Run:
    """Return a function that runs a command, expects an exit code, and returns stdout and stderr together."""

    def run(
        *command: str,
        cwd: Path,
        code: int = 0,
        env: Mapping[str, str | None] | None = None,
    ) -> str:
        done = interpreter.run(command, cwd=cwd, timeout=200, env=env)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
