"""The tutorials of docs/tutorials, typed from top to bottom in one folder, with what they say is printed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.pages import DOCS, Page

ROOT = Path(__file__).parents[2]
TUTORIALS = [
    "pretrain",
    "chat_model",
    "hugging_face",
    "internevo",
    "xtuner",
    "custom_model",
    "s3",
]


def pattern(shown: str) -> re.Pattern[str]:
    """Return what matches an output: ``...`` is any text of a line, and alone in a line any number of lines."""
    parts = []
    for line in shown.splitlines():
        if line == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(".*".join(map(re.escape, line.split("..."))) + r"\n")
    return re.compile("".join(parts))


class TypedShell:
    """A user's shell in one folder: what a command exports holds for the next ones, and background jobs run on.

    Port 9000 of the pages is a free one here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._exports = folder.parent / f"{folder.name}.exports"
        self._jobs = folder.parent / f"{folder.name}.jobs"
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            self._port = int(server.getsockname()[1])

    def type_in(self, commands: str, exit_code: int = 0) -> str:
        """Run commands as a shell would, and return what they print."""
        programs = Path(sys.executable).parent
        env = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        typed = commands.replace("9000", str(self._port))
        lines = [
            f"if [ -e {self._exports} ]; then . {self._exports}; fi",
            typed + f"export -p > {self._exports}",
            f"jobs -pr >> {self._jobs}",
        ]
        finished = subprocess.run(
            ["bash", "-euc", "\n".join(lines)],
            cwd=self.folder,
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert finished.returncode == exit_code, commands + finished.stdout[-4000:]
        if f"-p {self._port}" in typed:
            self._wait_for_server()
        return finished.stdout

    def _wait_for_server(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("the server of the page does not answer")

    def close(self) -> None:
        """End the jobs that still run in the background."""
        if self._jobs.exists():
            for pid in self._jobs.read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def follow(page: Page, shell: TypedShell) -> None:
    """Write the files and run the commands of a page; compare the output with the block that follows."""
    output = ""
    for block in page.blocks:
        if block.need is not None:
            continue
        if block.file is not None:
            file = shell.folder / block.file
            file.write_text(block.text, encoding="utf-8")
        elif block.info == "sh":
            output = shell.type_in(block.text)
        elif block.info == "sh exit-2":
            output = shell.type_in(block.text, exit_code=2)
        else:
            assert block.info == "text", f"{page.name}: {block.info}"
            shown = pattern(block.text)
            assert shown.fullmatch(output), f"{block.text}\nprinted:\n{output[-4000:]}"


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[TypedShell]:
    folder = tmp_path / "home"
    folder.mkdir()
    shell = TypedShell(folder)
    yield shell
    shell.close()


@pytest.mark.timeout(600)
def test_the_tutorials_as_they_are_typed(shell: TypedShell) -> None:
    """Each continues in the folder of the one before it."""
    for name in TUTORIALS:
        follow(Page(DOCS / f"tutorials/{name}.md"), shell)


def test_every_tutorial_is_typed() -> None:
    names = [path.stem for path in (DOCS / "tutorials").glob("*.md")]
    assert {name for name in names if not name.endswith(".zh")} == set(TUTORIALS)
