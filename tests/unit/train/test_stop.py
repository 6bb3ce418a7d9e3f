"""The stop file and signals: what each asks, and that all ranks do the same."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from evomesh.checkpoint.exchange import OneProcess
from evomesh.train.signals import StopRequest
from evomesh.train.stop import StopPoll, Wish
from tests.unit.checkpoint.ranks import ThreadExchange, run_ranks


def test_the_documents_meaning(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "stop"
    poll = StopPoll(StopRequest(), str(path), OneProcess())
    assert path.read_text().strip() == "0" and poll.ask(0) == poll.ask(5) == Wish()
    path.write_text("7")
    assert poll.ask(6) == Wish() and poll.ask(7) == Wish(save=True, stop=True) and poll.ask(8) == Wish()
    path.write_text("-9\n")
    assert poll.ask(8) == Wish() and poll.ask(9) == Wish(save=True)


def test_nonsense_is_said_once_and_asks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "stop"
    path.write_text("soon")
    poll = StopPoll(StopRequest(), str(path), OneProcess())
    assert [poll.ask(step) for step in range(4)] == [Wish()] * 4
    assert len(caplog.records) == 1 and "write the number of a step" in caplog.text
    path.unlink()
    assert poll.ask(4) == Wish()


def test_a_signal_on_one_rank_stops_all(tmp_path: Path) -> None:
    def one(exchange: ThreadExchange) -> tuple[Wish, Wish, object]:
        request = StopRequest()
        poll = StopPoll(request, str(tmp_path / "stop"), exchange)
        before = poll.ask(1)
        if exchange.rank == 2:
            request.signal = signal.SIGTERM
        return before, poll.ask(2), request.signal

    assert run_ranks(4, one) == [(Wish(), Wish(stop=True), signal.SIGTERM)] * 4
