"""The line between the inner loop and the rest: a test that starts another interpreter is slow, and marked so.

And what unit tests share: which of them run in one worker, and the commands that they call.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.testing

HERE = Path(__file__).parent
# gradio, and the models of transformers, take seconds to import: one worker does.
ONE_WORKER_FOLDERS = (HERE / "serve", HERE / "checkpoint/huggingface")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker of pytest-xdist run the tests of a file, so that its fixtures are made once."""
    for item in items:
        file = item.path
        if not file.is_relative_to(HERE) or item.get_closest_marker("xdist_group"):
            continue
        group = next((f for f in ONE_WORKER_FOLDERS if file.is_relative_to(f)), file)
        item.add_marker(pytest.mark.xdist_group(str(group.relative_to(HERE))))


@pytest.fixture(scope="session", autouse=True)
def commands_are_built_once() -> Iterator[None]:
    """Keep the command that typer builds: for each call it would read the options of all functions again."""
    with pytest.MonkeyPatch.context() as patch:
        build = typer.testing._get_command
        patch.setattr(typer.testing, "_get_command", functools.cache(build))
        yield


@pytest.fixture(autouse=True)
def stays_in_this_process(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail a test that starts an interpreter without the mark: `make test-fast` would wait for its imports."""
    # Another test may have left it disabled, and some count what is held.
    gc.enable()
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
