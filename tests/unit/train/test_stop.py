"""The stop file and signals: what each asks, and that all ranks do the same."""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from evomesh.parallel.exchange import SingleProcessExchange
from evomesh.train.signals import StopRequest
from evomesh.train.stop import StopDecision, StopPoint, StopPoll
from tests.unit.checkpoint.ranks import ThreadExchange, run_ranks


def test_the_documents_meaning(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "stop"
    poll = StopPoll(StopRequest(), str(path), SingleProcessExchange())
    assert path.read_text().strip() == "0" and poll.ask(0) == poll.ask(5) == StopDecision()
    path.write_text("7")
    assert (
        poll.ask(6) == StopDecision()
        and poll.ask(7) == StopDecision(save=True, stop=True)
        and poll.ask(8) == StopDecision()
    )
    path.write_text("-9\n")
    assert poll.ask(8) == StopDecision() and poll.ask(9) == StopDecision(save=True)


def test_nonsense_is_said_once_and_asks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "stop"
    path.write_text("soon")
    poll = StopPoll(StopRequest(), str(path), SingleProcessExchange())
    assert [poll.ask(step) for step in range(4)] == [StopDecision()] * 4
    assert len(caplog.records) == 1 and "write the number of a step" in caplog.text
    path.unlink()
    assert poll.ask(4) == StopDecision()


def test_a_signal_on_one_rank_stops_all(tmp_path: Path) -> None:
    def one(exchange: ThreadExchange) -> tuple[StopDecision, StopDecision, object]:
        request = StopRequest()
        poll = StopPoll(request, str(tmp_path / "stop"), exchange)
        before = poll.ask(1)
        if exchange.rank == 2:
            request.signal = signal.SIGTERM
        return before, poll.ask(2), request.signal

    assert run_ranks(4, one) == [(StopDecision(), StopDecision(stop=True), signal.SIGTERM)] * 4


STEPS, MICRO_BATCHES, RANKS = 4, 6, 4


def stopped_at(seed: int) -> tuple[set[tuple[int, int]], tuple[int, int]]:
    """Where each of four ranks stopped that run at their own pace but for the end of a step; and when one was asked."""
    store, draw = HashStore(), random.Random(seed)
    asked = (draw.randrange(STEPS), draw.randrange(1, MICRO_BATCHES))
    asked_ranks = set(draw.sample(range(RANKS), draw.choice([1, 1, 2, 4])))
    together = threading.Barrier(RANKS)
    places: list[tuple[int, int]] = [(-1, -1)] * RANKS
    signalled = threading.Event()

    def run(rank: int) -> None:
        point, pace = StopPoint(store), random.Random(seed * RANKS + rank)
        for step in range(STEPS):
            for done in range(1, MICRO_BATCHES):
                time.sleep(pace.random() * 1e-4)
                wanted = rank in asked_ranks and (step, done) >= asked
                if wanted:
                    signalled.set()
                if point.reached(step, done, wanted):
                    places[rank] = (step, done)
                    return
            together.wait()  # the end of a step: gradients are summed, and ranks ask each other about signals
            if signalled.is_set():
                places[rank] = (step, MICRO_BATCHES)
                return
            together.wait()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return set(places), asked


def test_all_ranks_break_off_at_the_same_micro_batch() -> None:
    early = 0
    for seed in range(60):
        places, asked = stopped_at(seed)
        (place,) = places
        assert place[0] == asked[0] and place >= asked
        early += place[1] < MICRO_BATCHES
    assert early > 30, "hardly ever before the end of the step"


def test_a_rank_behind_stops_where_the_first_one_may_not_pass() -> None:
    store = HashStore()
    ahead, behind = StopPoint(store), StopPoint(store)
    assert [ahead.reached(0, done, False) for done in (1, 2, 3)] == [False] * 3
    assert not behind.reached(0, 1, True)  # the other has passed 3: both stop at 4
    assert [behind.reached(0, done, True) for done in (2, 3, 4)] == [False, False, True]
    assert ahead.reached(0, 4, False)
