"""Requests of the stop file and of signals, and that all ranks act on them alike."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from evomesh.errors import UserError
from evomesh.parallel.exchange import SingleProcessExchange
from evomesh.train.signals import StopRequest
from evomesh.train.stop import StopBoundary, StopDecision, StopPoll
from tests.unit.checkpoint.native.ranks import ThreadExchange, run_ranks


def test_numbers_in_the_stop_file_mean_what_they_do_in_internevo(
    tmp_path: Path,
) -> None:
    path = tmp_path / "folder" / "stop"
    poll = StopPoll(StopRequest(), str(path), SingleProcessExchange())
    assert (
        path.read_text().strip() == "0"
        and poll.after_step(0) == poll.after_step(5) == StopDecision()
    )
    path.write_text("7")
    assert (
        poll.after_step(6) == StopDecision()
        and poll.after_step(7) == StopDecision(save=True, stop=True)
        and poll.after_step(8) == StopDecision()
    )
    path.write_text("-9\n")
    assert poll.after_step(8) == StopDecision() and poll.after_step(9) == StopDecision(
        save=True
    )


def test_text_in_the_stop_file_is_ignored_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "stop"
    path.write_text("soon")
    poll = StopPoll(StopRequest(), str(path), SingleProcessExchange())
    assert [poll.after_step(step) for step in range(4)] == [StopDecision()] * 4
    assert len(caplog.records) == 1 and "write a step number" in caplog.text
    path.unlink()
    assert poll.after_step(4) == StopDecision()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero"])
def test_a_stop_file_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "stop"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    with pytest.raises(UserError, match="not a regular file"):
        StopPoll(StopRequest(), str(path), SingleProcessExchange())


@pytest.mark.timeout(20)
def test_a_stop_file_that_becomes_a_pipe_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "stop"
    poll = StopPoll(StopRequest(), str(path), SingleProcessExchange())
    path.unlink()
    os.mkfifo(path)
    assert [poll.after_step(step) for step in range(3)] == [StopDecision()] * 3
    (record,) = caplog.records
    assert "is a named pipe" in record.getMessage()


def test_a_signal_on_one_rank_stops_all(tmp_path: Path) -> None:
    def one(exchange: ThreadExchange) -> tuple[StopDecision, StopDecision, object]:
        request = StopRequest()
        poll = StopPoll(request, str(tmp_path / "stop"), exchange)
        before = poll.after_step(1)
        if exchange.rank == 2:
            request.signal = signal.SIGTERM
        return before, poll.after_step(2), request.signal

    assert (
        run_ranks(4, one)
        == [(StopDecision(), StopDecision(stop=True), signal.SIGTERM)] * 4
    )


STEPS, MICRO_BATCHES, RANKS = 4, 6, 4


def stopped_at(seed: int) -> tuple[set[tuple[int, int]], tuple[int, int]]:
    """Run four ranks at different paces and return the boundaries where they stopped, and the first request."""
    store, draw = HashStore(), random.Random(seed)
    asked = (draw.randrange(STEPS), draw.randrange(1, MICRO_BATCHES))
    asked_ranks = set(draw.sample(range(RANKS), draw.choice([1, 1, 2, 4])))
    together = threading.Barrier(RANKS)
    stops: list[tuple[int, int]] = [(-1, -1)] * RANKS
    signalled = threading.Event()

    def run(rank: int) -> None:
        boundary, pace = StopBoundary(store), random.Random(seed * RANKS + rank)
        for step in range(STEPS):
            for done in range(1, MICRO_BATCHES):
                time.sleep(pace.random() * 1e-4)
                wanted = rank in asked_ranks and (step, done) >= asked
                if wanted:
                    signalled.set()
                if boundary.reached(step, done, wanted):
                    stops[rank] = (step, done)
                    return
            together.wait()  # the end of a step: gradients are summed, and ranks ask each other about signals
            if signalled.is_set():
                stops[rank] = (step, MICRO_BATCHES)
                return
            together.wait()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return set(stops), asked


def test_all_ranks_stop_at_the_same_micro_batch() -> None:
    early = 0
    for seed in range(60):
        stops, asked = stopped_at(seed)
        (stop,) = stops
        assert stop[0] == asked[0] and stop >= asked
        early += stop[1] < MICRO_BATCHES
    assert early > 30, "hardly ever before the end of the step"


def test_a_slower_rank_stops_at_the_first_boundary_that_none_has_passed() -> None:
    store = HashStore()
    ahead, behind = StopBoundary(store), StopBoundary(store)
    assert [ahead.reached(0, done, False) for done in (1, 2, 3)] == [False] * 3
    assert not behind.reached(0, 1, True)  # the other has passed 3: both stop at 4
    assert [behind.reached(0, done, True) for done in (2, 3, 4)] == [False, False, True]
    assert ahead.reached(0, 4, False)
