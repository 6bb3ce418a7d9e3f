"""A command whose reader has gone (``| head``) ends like any Unix tool: silently, with 128 + SIGPIPE."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from evomesh.cli.main import main
from evomesh.cli.run import run
from evomesh.errors import EXIT_READER_LEFT
from tests.support.golden import write_bin
from tests.support.interpreter import Interpreter

CONFIG = str(Path(__file__).parents[2] / "configs/demo.py")
DATA = "DATA"  # replaced by the path of a token file


def with_closed_pipe(descriptors: tuple[int, ...], call: Callable[[], object]) -> None:
    """Call with a pipe that nobody reads as standard output (1), or output and error (1, 2)."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in descriptors:
        os.dup2(writer, descriptor)
    # Block-buffered, as Python does for a pipe.
    sys.stdout = open(1, "w")  # noqa: SIM115
    if 2 in descriptors:
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
    call()


def call_main(words: tuple[str, ...]) -> None:
    sys.argv = ["evomesh", *words]
    main()


@pytest.mark.parametrize(
    ("descriptors", "words"),
    [
        ((1,), ("--help",)),
        ((1, 2), ("--version",)),
        ((1,), ("config", "show", CONFIG)),
        ((1, 2), ("config", "list")),
        ((1, 2), ("data", "show", DATA, "--seq-len", "10")),
        ((1,), ("data", "verify", DATA)),
        ((1,), ("xtuner", "list-cfg")),
        ((1,), ("plan", CONFIG, "--gpus", "1")),
    ],
)
def test_commands_end_quietly(
    interpreter: Interpreter,
    tmp_path: Path,
    descriptors: tuple[int, ...],
    words: tuple[str, ...],
) -> None:
    data = str(write_bin(tmp_path / "en/a.bin", [[1, 2, 3, 4]] * 8))
    arguments = tuple(data if word == DATA else word for word in words)
    command = partial(with_closed_pipe, descriptors, partial(call_main, arguments))
    finished = interpreter.run(command)
    assert (finished.returncode, finished.stderr) == (EXIT_READER_LEFT, "")


def print_then_fail() -> None:
    def command() -> None:
        print("x" * 100_000)  # more than the buffer: the write itself fails

    run(command)


def lose_the_reader_while_training() -> None:
    def command() -> None:
        print("x")

    run(command, trains=True)


def lose_a_connection() -> None:
    def command() -> None:
        raise BrokenPipeError("a socket")

    run(command)


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (print_then_fail, EXIT_READER_LEFT, ""),
        (lose_the_reader_while_training, 0, ""),
        (
            lose_a_connection,
            2,
            "error: a socket\n  explain: evomesh explain EVO-SYS-001",
        ),
    ],
)
def test_the_reader_of_the_output_decides(
    interpreter: Interpreter, command: Callable[[], None], code: int, words: str
) -> None:
    finished = interpreter.run(partial(with_closed_pipe, (1,), command))
    assert finished.returncode == code
    assert finished.stderr.strip() == words
