"""Logs, metrics and TensorBoard that cannot be written warn once, leave nothing torn, and raise nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from evomesh.monitor.log import close_logging, setup_logging
from evomesh.monitor.metrics import MetricsFile, StepRecord
from evomesh.monitor.optional_output import OptionalOutput
from evomesh.monitor.tensorboard import TensorBoardWriter

LOGGER = logging.getLogger("evomesh.somewhere")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_logging()


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes, as a disk without room would."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def record(step: int) -> StepRecord:
    return StepRecord(
        1.0, step, 2.0, 3.0, 1e-3, 1.0, 0.5, 1, 10, 0, 1, 8, 1, 1, 0.95, 0.1
    )


def test_the_first_failure_is_logged_and_later_ones_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device", "a/file")

    for tries_again, expected_calls in ((True, 3), (False, 1)):
        calls: list[int] = []
        caplog.clear()
        output = OptionalOutput("metrics.jsonl", tries_again=tries_again)
        for _ in range(3):
            output.attempt(fail)
        (line,) = caplog.messages
        assert line.startswith(
            "cannot write metrics.jsonl (No space left on device: a/file); "
        )
        assert len(calls) == expected_calls


def test_a_bug_in_an_output_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        OptionalOutput("x", tries_again=True).attempt(lambda: 1 // 0)


def test_metrics_are_never_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(record(0))
        with full_disk(path.stat().st_size + 20):
            for step in (1, 2):
                with pytest.raises(OSError):
                    metrics.write(record(step))
        metrics.write(record(3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        0,
        3,
    ]


def test_a_metrics_file_that_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "run/metrics.jsonl"
    with MetricsFile(path) as metrics:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(FileNotFoundError, match="the file was removed"):
            metrics.write(record(0))


def test_a_log_file_on_a_full_disk_is_reported_by_the_terminal(tmp_path: Path) -> None:
    terminal = (tmp_path / "terminal").open("w")
    setup_logging(tmp_path / "run", "main", console=Console(file=terminal))
    LOGGER.info("before")
    with full_disk(1000):
        for number in range(100):
            LOGGER.info("line %d", number)
    text = (tmp_path / "terminal").read_text()
    assert "before" in text
    assert "Traceback" not in text
    terminal.close()


def test_a_reader_that_leaves_silences_the_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    reader, writer = os.pipe()
    with open(writer, "w", buffering=1) as stream:
        setup_logging(console=Console(file=stream))
        os.close(reader)
        for number in range(10):
            LOGGER.info("line %d", number)
    assert "Logging error" not in capfd.readouterr().err


# One line in a command.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_without_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "board"
    board = TensorBoardWriter(folder, queue=1)
    board.scalars(0, {"loss": 1.0})
    shutil.rmtree(folder)
    output = OptionalOutput("TensorBoard files", tries_again=False)
    for step in range(1, 6):
        output.attempt(lambda step=step: board.scalars(step, {"loss": 1.0}))
    output.attempt(board.close)
    assert len(caplog.messages) <= 1
