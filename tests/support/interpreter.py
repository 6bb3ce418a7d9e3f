"""Command lines run in a process forked from an interpreter that has torch imported: a start costs 0.1 s, not 3 s.

finished = interpreter.run(["train.py", "--config", "configs/demo.py"], cwd=folder)
assert finished.returncode == 0, finished.stderr

running = interpreter.start(["evomesh", "train", "c.py"])
running.wait_for("step=3,")
running.signal(signal.SIGKILL)
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.support.forking import context

Command = Sequence[str] | Callable[[], Any]


@dataclass(frozen=True)
class Finished:
    """``returncode`` is negative for a signal, as in ``subprocess``."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A started command."""

    def __init__(self, process: BaseProcess, folder: Path) -> None:
        self._process, self._folder = process, folder

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Sends the signal to the process alone (its own children get none)."""
        os.kill(self.pid, number)

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Returns once stdout or stderr holds ``text``.

        Raises:
            AssertionError: the process ended or the time ran out before.
        """
        deadline = time.monotonic() + timeout
        while text not in self.stdout and text not in self.stderr:
            ended = not self._process.is_alive()
            if (
                ended and text not in self.stdout + self.stderr
            ) or time.monotonic() > deadline:
                why = (
                    f"exit code {self._process.exitcode}"
                    if ended
                    else f"{timeout:g} s passed"
                )
                raise AssertionError(
                    f"{text!r} never came ({why})\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"
                )
            time.sleep(0.01)

    def wait(self, timeout: float = 120.0) -> Finished:
        """Waits for the end. A command still running after ``timeout`` seconds is killed with its children."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(
                f"still running after {timeout:g} s\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"
            )
        return Finished(self._process.exitcode, self.stdout, self.stderr)

    def kill(self) -> None:
        """Ends the process and all that it started."""
        self._process.kill()  # the group may not exist yet
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()


class Interpreter:
    """Starts commands; ``close`` ends those still running."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="interpreter"))
        self._running: list[Running] = []

    def start(
        self,
        command: Command,
        *,
        cwd: str | Path = ".",
        env: Mapping[str, str | None] | None = None,
        threads: int = 1,
    ) -> Running:
        """Args:
        command: ``["script.py", ...]`` (a script), ``["evomesh", ...]`` (the command line), or a module-level function.
        env: variables to set, or to remove where the value is None.
        threads: compute threads of torch (OMP_NUM_THREADS).
        """
        folder = Path(tempfile.mkdtemp(dir=self._root))
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        arguments = (
            command,
            str(Path(cwd).resolve()),
            dict(env or {}),
            threads,
            str(folder),
        )
        process = context().Process(target=_child, args=arguments)
        process.start()
        self._running.append(Running(process, folder))
        return self._running[-1]

    def run(
        self, command: Command, *, timeout: float = 120.0, **options: Any
    ) -> Finished:
        return self.start(command, **options).wait(timeout)

    def start_ranks(
        self, command: Command, ranks: int, **options: Any
    ) -> list[Running]:
        """What ``torchrun --nproc_per_node=ranks`` would start, with its variables, and without its supervisor."""
        env = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
        }
        env |= {"LOCAL_WORLD_SIZE": str(ranks)} | dict(options.pop("env", None) or {})
        return [
            self.start(
                command,
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **options,
            )
            for rank in range(ranks)
        ]

    def close(self) -> None:
        for running in self._running:
            running.kill()
        self._running = []


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _child(
    command: Command, cwd: str, env: dict[str, str | None], threads: int, folder: str
) -> None:
    os.setsid()  # its own group, so that kill() reaches what it starts
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr, sys.stdin = (
        open(1, "w", buffering=1),  # noqa: SIM115  # open as long as the process
        open(2, "w", buffering=1),  # noqa: SIM115
        open(0),  # noqa: SIM115
    )
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    # The fork server ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for key, value in env.items():
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    import torch

    torch.set_num_threads(threads)
    if callable(command):
        command()
        return
    sys.argv = list(command)
    if command[0] == "evomesh":
        from evomesh.cli.main import main

        sys.exit(main())
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    runpy.run_path(command[0], run_name="__main__")
