"""Every file call of a short run, and of the main commands, fails once: a message or a finished run, never a traceback.

The calls are counted by Python's audit events, so no list of places has to be kept. After each fault the same command
runs again, without one, and has to succeed. Each test takes every EVOMESH_FAULT_STRIDE-th call; 1 is all of them.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.interpreter import Interpreter
from tests.support.runs import write_run

FAULTS = (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EMFILE)
EVENTS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "os.link",
    "os.utime",
)
TINY = """
model |= dict(num_layers=1, hidden_size=16, num_attention_heads=2, num_kv_attention_heads=1)
data |= dict(total_steps=2, valid_every=2)
lr_scheduler["warmup_ratio"] = 0.0
ckpt |= dict(checkpoint_every=1, stop_file_path="stop", keep_last=2)
"""
ALLOWED = (0, 2, 75)
STRIDE = int(os.environ.get("EVOMESH_FAULT_STRIDE", "12"))


def fail_call(number: int) -> list[str]:
    """Let the ``number``-th file call below the working folder fail; return the list that all calls are added to."""
    here, calls = os.getcwd(), []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event not in EVENTS
            or not arguments
            or not isinstance(arguments[0], str | bytes | os.PathLike)
        ):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(here + os.sep):
            calls.append(f"{event} {path}")
            if len(calls) == number:
                code = FAULTS[number % len(FAULTS)]
                raise OSError(code, os.strerror(code), os.fsdecode(arguments[0]))

    sys.addaudithook(hook)
    return calls


def command_with_fault(arguments: tuple[str, ...], number: int) -> None:
    from evomesh.cli.main import main

    calls = fail_call(number)
    sys.argv = ["evomesh", *arguments]
    try:
        main()
    finally:
        print(f"CALLS {len(calls)}", flush=True)


def faulty(arguments: tuple[str, ...], number: int) -> Callable[[], None]:
    return functools.partial(command_with_fault, arguments, number)


def calls_of(interpreter: Interpreter, folder: Path, arguments: tuple[str, ...]) -> int:
    finished = interpreter.run(faulty(arguments, 0), cwd=folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return int(finished.stdout.rpartition("CALLS ")[2])


def outcomes(
    interpreter: Interpreter,
    arguments: tuple[str, ...],
    make: Callable[[str], Path],
    check: Callable[[Path], None],
) -> list[str]:
    """Fail one call after the other; return a line for every fault with an outcome that is not allowed.

    Args:
        make: creates a fresh working folder of a name.
        check: raises an AssertionError unless the command has done its work.
    """
    total = calls_of(interpreter, make("counted"), arguments)
    wrong = []
    for number in range(1, total + 1, STRIDE):
        folder = make(str(number))
        failed = interpreter.run(faulty(arguments, number), cwd=folder)
        output = failed.stdout + failed.stderr
        if (
            failed.returncode not in ALLOWED
            or "Traceback" in output
            or "Logging error" in output
        ):
            wrong.append(
                f"call {number}: exit code {failed.returncode}\n{output[-1500:]}"
            )
            continue
        # A folder that holds a part of an export is refused, so the next start takes another one.
        next_arguments = [
            "out2" if argument == "out" else argument for argument in arguments
        ]
        again = interpreter.run(["evomesh", *next_arguments], cwd=folder)
        if again.returncode != 0:
            wrong.append(
                f"call {number}, next start: {again.returncode}\n{again.stderr[-1500:]}"
            )
            continue
        check(folder)
        shutil.rmtree(folder)
    return wrong


@pytest.mark.timeout(1500)
def test_training(tmp_path: Path, interpreter: Interpreter) -> None:
    def make(name: str) -> Path:
        write_run(tmp_path / name, TINY)
        return tmp_path / name

    def check(folder: Path) -> None:
        assert (folder / "ckpts/step-00000002/commit.json").exists(), folder
        # A start that failed may have left its folder.
        for metrics in folder.glob("RUN/*/*/metrics.jsonl"):
            steps = [
                json.loads(line)["step"] for line in metrics.read_text().splitlines()
            ]
            assert steps == sorted(set(steps))

    wrong = outcomes(interpreter, ("train", "config.py"), make, check)
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "arguments",
    [
        ("config", "check", "config.py"),
        ("data", "verify", "data/train"),
        ("data", "inspect", "data/train"),
        ("ckpt", "ls", "ckpts"),
        ("ckpt", "verify", "ckpts"),
        ("convert", "to-hf", "ckpts", "out"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_commands(
    tmp_path: Path, interpreter: Interpreter, arguments: tuple[str, ...]
) -> None:
    write_run(tmp_path / "trained", TINY)
    assert (
        interpreter.run(
            ["evomesh", "train", "config.py"], cwd=tmp_path / "trained"
        ).returncode
        == 0
    )

    def make(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "trained", tmp_path / name))

    wrong = outcomes(interpreter, arguments, make, lambda folder: None)
    assert not wrong, "\n".join(wrong)
