"""What several files of end-to-end tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support.interpreter import Interpreter

Run = Callable[..., str]
HERE = Path(__file__).parent
# Their tests share a model, a run or servers that take seconds to make: one worker does.
ONE_WORKER_FILES = {
    "test_convert_hf.py",
    "test_data_page.py",
    "test_generate.py",
    "test_page.py",
    "test_guides.py",
    "test_report_page.py",
    "test_rgw.py",
    "test_run_files.py",
    "test_serve.py",
    "test_xtuner.py",
}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker of pytest-xdist run the tests of a file that shares something large."""
    for item in items:
        if item.path.parent == HERE and item.path.name in ONE_WORKER_FILES:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


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
