"""Requests of the stop file and of signals, and that all ranks act on them alike."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from evomesh.errors import UserError
from evomesh.parallel.exchange import SingleProcessExchange
from evomesh.train.signals import StopRequest
from evomesh.train.stop import StopBoundary, StopDecision, StopPoll, StopRegister
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
    store = HashStore()

    def one(exchange: ThreadExchange) -> tuple[StopDecision, StopDecision, object]:
        request = StopRequest()
        poll = StopPoll(request, str(tmp_path / "stop"), exchange, store)
        before = poll.before_first_step(1)
        if exchange.rank == 2:
            request.signal = signal.SIGTERM
            poll.after_step(2)
        exchange.broadcast(None)
        return before, poll.after_step(2), request.signal

    assert (
        run_ranks(4, one)
        == [(StopDecision(), StopDecision(stop=True), signal.SIGTERM)] * 4
    )


def test_a_signal_before_the_first_step_stops_all(tmp_path: Path) -> None:
    store = HashStore()

    def one(exchange: ThreadExchange) -> StopDecision:
        request = StopRequest()
        if exchange.rank == 2:
            request.signal = signal.SIGINT
        poll = StopPoll(request, str(tmp_path / "stop"), exchange, store)
        return poll.before_first_step(7)

    assert run_ranks(4, one) == [StopDecision(stop=True)] * 4


class CountedExchange(ThreadExchange):
    """An exchange between threads that counts its messages."""

    messages = 0

    def gather(self, message: object) -> list[object] | None:
        self.messages += 1
        return super().gather(message)

    def broadcast(self, message: object) -> object:
        self.messages += 1
        return super().broadcast(message)


def test_a_step_has_no_host_collective(tmp_path: Path) -> None:
    store = HashStore()

    def one(exchange: ThreadExchange) -> list[int]:
        exchange.__class__ = CountedExchange
        assert isinstance(exchange, CountedExchange)
        poll = StopPoll(StopRequest(), str(tmp_path / "stop"), exchange, store)
        poll.before_first_step(0)
        counts = [exchange.messages]
        for step in range(20):
            for done in range(1, 4):
                assert not poll.between_micro_batches(step, done)
            assert poll.after_step(step + 1) == StopDecision()
        return [*counts, exchange.messages]

    assert run_ranks(4, one) == [[2, 2]] * 4


STEPS, MICRO_BATCHES, RANKS = 4, 6, 4


class StopRun:
    """Four ranks at different paces; only with a stop file do they wait for each other at the end of a step.

    Args:
        seed: of the paces, of who is asked to stop and when.
        number: to write into the stop file when rank 0 reaches the boundary.
    """

    def __init__(self, seed: int, path: Path, number: int = 0) -> None:
        draw = random.Random(seed)
        self.seed, self.path, self.number = seed, path, number
        self.asked = (draw.randrange(STEPS), draw.randrange(MICRO_BATCHES))
        self.asked_ranks = set(draw.sample(range(RANKS), draw.choice([1, 1, 2, 4])))
        self.store = HashStore()

    def decisions(self) -> list[list[tuple[tuple[int, int], StopDecision]]]:
        """What each rank decides at its boundaries, where that is anything."""
        path = str(self.path / f"stop {self.seed}")

        def one(
            exchange: ThreadExchange,
        ) -> list[tuple[tuple[int, int], StopDecision]]:
            request = StopRequest()
            pace = random.Random(self.seed * RANKS + exchange.rank)
            poll = StopPoll(request, path, exchange, self.store)
            made = []
            poll.before_first_step(0)
            for step in range(STEPS):
                for done in range(MICRO_BATCHES):
                    here = (step, done)
                    time.sleep(pace.random() * 1e-4)
                    asks = exchange.rank in self.asked_ranks and not self.number
                    if asks and here >= self.asked:
                        request.signal = signal.SIGTERM
                    if here == self.asked and self.number and exchange.rank == 0:
                        Path(path).write_text(str(self.number))
                    decision = (
                        StopDecision(stop=poll.between_micro_batches(step, done))
                        if done
                        else poll.after_step(step)
                    )
                    if decision != StopDecision():
                        made.append((here, decision))
                    if decision.stop:
                        assert request.signal == (None if self.number else 15)
                        return made
                if self.number:
                    exchange.broadcast(None)  # as the sums of a step do
            return made

        return run_ranks(RANKS, one)


def test_all_ranks_stop_at_the_same_boundary(tmp_path: Path) -> None:
    early = 0
    for seed in range(40):
        run = StopRun(seed, tmp_path)
        first, *others = run.decisions()
        assert others == [first] * 3
        if first:
            ((stop, decision),) = first
            assert decision == StopDecision(stop=True) and stop >= run.asked
            early += stop[1] > 0
    assert early > 12, "hardly ever before the end of the step"


@pytest.mark.parametrize("number", [2, -2])
def test_all_ranks_obey_the_stop_file_after_the_same_step(
    tmp_path: Path, number: int
) -> None:
    after: set[int] = set()
    for seed in range(40):
        run = StopRun(seed, tmp_path, number)
        first, *others = run.decisions()
        assert others == [first] * 3
        for (step, done), decision in first:
            assert done == 0
            assert decision == StopDecision(save=True, stop=number > 0)
            after.add(step)
        if run.asked < (1, 1):  # read by rank 0 before it starts the second step
            assert [step for (step, _), _ in first] == [2]
    assert after == {2, 3}


def test_a_late_number_of_the_stop_file_holds_one_step_later() -> None:
    register = StopRegister(farthest=(7, 3))
    assert register.with_file_number(7, step=7).file_number == 8
    assert register.with_file_number(-6, step=6).file_number == -8
    assert register.with_file_number(8, step=6).file_number == 8
    assert register.with_file_number(5, step=6).file_number == 5, "long ago"
    assert StopRegister().with_file_number(0, step=0).file_number == 0


def test_a_slower_rank_stops_at_the_first_boundary_that_none_has_passed() -> None:
    store, term = HashStore(), signal.SIGTERM
    ahead, behind = StopBoundary(store), StopBoundary(store)
    for done in (1, 2, 3):
        assert ahead.visit((0, done)).stop_at is None
    # The other has passed 3: both stop at 4.
    for done in (1, 2, 3, 4):
        assert behind.visit((0, done), term).stop_at == (0, 4)
    assert ahead.visit((0, 4)).stop_at == (0, 4)


def test_an_earlier_run_of_the_same_processes_leaves_no_request(tmp_path: Path) -> None:
    store = HashStore()
    StopBoundary(store).visit((5, 0), signal.SIGTERM, 9)

    def one(exchange: ThreadExchange) -> list[StopDecision]:
        poll = StopPoll(StopRequest(), str(tmp_path / "stop"), exchange, store)
        return [poll.before_first_step(8), poll.after_step(9)]

    assert run_ranks(2, one) == [[StopDecision()] * 2] * 2
