"""Lost ranks are named, ranks that only were slow are not ended, and all ranks end with one verdict."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from evomesh.parallel import peer_watch
from evomesh.parallel.peer_watch import DONE, Heartbeats, PeerWatch, Verdict, failed
from evomesh.parallel.rendezvous import JobAddress, open_store, second_connection
from tests.support.interpreter import free_port

pytestmark = pytest.mark.slow

HOSTS = {0: "n0", 1: "n1", 2: "n2"}


def test_silence_is_counted_from_the_last_change() -> None:
    heartbeats = Heartbeats([1, 2], now=100.0)
    heartbeats.hear({1: b"1", 2: b"1"}, 101.0)
    heartbeats.hear({1: b"2", 2: b"1"}, 105.0)
    assert heartbeats.silence(106.0) == {1: 1.0, 2: 5.0}
    heartbeats.hear({2: DONE}, 107.0)
    assert heartbeats.silence(200.0) == {1: 95.0}


class Job:
    """Watches of three ranks in one process."""

    def __init__(self) -> None:
        port = free_port()
        self.addresses = [JobAddress(rank, 3, "127.0.0.1", port) for rank in range(3)]
        self.store = open_store(self.addresses[0])
        self.ended: dict[int, Verdict] = {}
        self.stopping: set[int] = set()
        self.all_ended = threading.Event()
        self.watches = {rank: self._watch(rank) for rank in range(3)}

    def _watch(self, rank: int) -> PeerWatch:
        def end(verdict: Verdict) -> None:
            self.ended[rank] = verdict
            self.watches[rank]._stopped.set()
            if len(self.ended) >= 2:
                self.all_ended.set()

        store = second_connection(self.addresses[rank])
        return PeerWatch(
            store, rank, HOSTS, end=end, stop_requested=lambda: rank in self.stopping
        )

    def freeze(self, rank: int) -> None:
        """Make a rank fall silent."""
        self.watches[rank]._stopped.set()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    for name, value in (
        ("BEAT_S", 0.02),
        ("SILENT_S", 1.0),
        ("SUSPECT_SILENT_S", 0.9),
        ("LINGER_S", 0.1),
    ):
        monkeypatch.setattr(peer_watch, name, value)
    job = Job()
    yield job
    for watch in job.watches.values():
        watch._stopped.set()


def start_but(
    job: Job, silent_rank: int, monkeypatch: pytest.MonkeyPatch, lost_s: float
) -> None:
    monkeypatch.setattr(peer_watch, "LOST_S", lost_s)
    job.store.set(f"alive/{silent_rank}", "1")
    for rank, watch in job.watches.items():
        if rank != silent_rank:
            watch.start()


@pytest.mark.parametrize("silent_rank", [0, 2])
def test_all_survivors_name_the_lost_rank(
    job: Job, silent_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_but(job, silent_rank, monkeypatch, lost_s=1.2)
    assert job.all_ended.wait(20)
    assert set(job.ended) == {0, 1, 2} - {silent_rank}
    for verdict in job.ended.values():
        assert verdict.rank == silent_rank and verdict.exit_code == 75
        assert verdict.sentence.startswith(
            f"rank {silent_rank} on n{silent_rank} is lost: it has not answered for "
        )


def test_a_short_silence_is_named_and_survived(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start_but(job, 2, monkeypatch, lost_s=1e6)
    while "rank 2 on n2 has not answered for" not in caplog.text:
        assert not job.all_ended.wait(0.01)
    job.watches[2].start()
    while "rank 2 on n2 answers again" not in caplog.text:
        assert not job.all_ended.wait(0.01)
    assert not job.ended


def test_a_stop_request_is_not_delayed_by_a_frozen_rank(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.stopping.add(0)
    start_but(job, 2, monkeypatch, lost_s=1e6)
    assert job.all_ended.wait(20)
    assert {verdict.rank for verdict in job.ended.values()} == {2}


def test_a_failed_collective_learns_the_name(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_but(job, 2, monkeypatch, lost_s=1e6)
    verdict = job.watches[1].name_lost_rank(20)
    assert verdict is not None and verdict.rank == 2


def test_the_first_error_is_everybodys(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_watch, "LOST_S", 1e6)
    for watch in job.watches.values():
        watch.start()
    first = job.watches[1].announce("no space\n  fix: free some", 2)
    second = job.watches[2].announce("another", 6)
    assert first == second == failed(1, "n1", "no space\n  fix: free some", 2)
    assert job.all_ended.wait(20)
    assert job.ended[0].sentence == "rank 1 on n1 ended: no space"
    assert 1 not in job.ended, (
        "the rank itself ends in its main thread, with its whole message"
    )


def test_ranks_that_finish_are_not_missed(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_watch, "LOST_S", 1.2)
    for watch in job.watches.values():
        watch.start()
    enders = [threading.Thread(target=watch.sign_off) for watch in job.watches.values()]
    enders[0].start()
    enders[0].join(0.2)
    assert enders[0].is_alive(), (
        "the store would end with rank 0 while others still need it"
    )
    for ender in enders[1:]:
        ender.start()
    for ender in enders:
        ender.join(20)
    assert not job.ended


@pytest.mark.parametrize("author", [0, 1])
def test_the_store_stays_until_every_other_rank_has_read_the_verdict(
    job: Job, monkeypatch: pytest.MonkeyPatch, author: int
) -> None:
    """The store ends with rank 0: a rank that has not read the verdict by then would print a second error."""
    monkeypatch.setattr(peer_watch, "LINGER_S", 60.0)
    job.watches[author].announce("the folder is a file", 2)
    for reader in {0, 1, 2} - {author, 2}:
        job.watches[reader]._accept(
            failed(author, HOSTS[author], "the folder is a file", 2)
        )
    lingering = threading.Thread(target=job.watches[0].linger, daemon=True)
    lingering.start()
    lingering.join(0.5)
    assert lingering.is_alive()  # rank 2 has not read it
    job.watches[2]._accept(failed(author, HOSTS[author], "the folder is a file", 2))
    lingering.join(30)
    assert not lingering.is_alive()
