"""The watchers of several hosts over real sockets, each with records of ranks in this process."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from evomesh.parallel.hang_watch import start_watcher
from evomesh.watchdog import watcher
from evomesh.watchdog.activity import Activity
from evomesh.watchdog.channel import LinkServer, connect
from evomesh.watchdog.diagnosis import HangLimits, RankReport
from evomesh.watchdog.ring import Place
from evomesh.watchdog.watcher import (
    HangVerdict,
    Watcher,
    WatcherNote,
    WatcherOptions,
    claim,
)

TOKEN = "secret"
SHORT = HangLimits(silence_s=0.02, long_phase_s=0.02)


def until(find: Callable[[], object]) -> None:
    """Call ``find`` until it returns something."""
    deadline = time.monotonic() + 30
    while not find():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_only_who_knows_the_token_is_heard() -> None:
    server = LinkServer(TOKEN)
    address = ("127.0.0.1", server.port)
    stranger = connect(address, "guess", "n2")
    stranger.send({"verdict": "end"})
    friend = connect(address, TOKEN, "n3")
    friend.send({"reports": [1]})
    received: list[object] = []
    until(lambda: received.extend(server.receive()) or received)
    assert received == [("n3", {"reports": [1]})]
    assert [link.host for link in server.links] == ["n3"]
    server.send({"stacks": True})
    assert friend.receive() == [{"stacks": True}]


@pytest.mark.parametrize(
    "line",
    [
        b"[1]\n",
        b"GET / HTTP/1.1\r\n",
        b'{"token": "\xc3\xa9"}\n',
        b"[" * 5000,
        b"[" * 3000 + b"\n",
    ],
    ids=["list", "http", "not ascii", "endless", "deep"],
)
def test_a_stranger_who_sends_anything_is_dropped(line: bytes) -> None:
    server = LinkServer(TOKEN)
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, 10) as stranger:
        stranger.sendall(line)
        until(lambda: server.receive() or is_closed(stranger))
    friend = connect(address, TOKEN, "n3")
    friend.send({"reports": [1]})
    received: list[object] = []
    until(lambda: received.extend(server.receive()) or received)
    assert received == [("n3", {"reports": [1]})]


def is_closed(connection: socket.socket) -> bool:
    """Return whether the other end has closed a connection."""
    connection.settimeout(0.05)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_a_watcher_whose_ranks_ended_before_it_looked_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []
    monkeypatch.setattr(watcher, "POLL_S", 0.001)
    monkeypatch.setattr(watcher, "UNSEEN_S", 0.05)
    (tmp_path / "n0").mkdir()
    alone = host(tmp_path, 0)
    look = alone.ranks.look

    def counted() -> list[RankReport]:
        looks.append(None)
        return look()

    monkeypatch.setattr(alone.ranks, "look", counted)
    alone.run()
    assert len(looks) > 1


@pytest.mark.slow
def test_a_watcher_shows_the_token_to_nobody(tmp_path: Path) -> None:
    """A command line can be read by every user of a host."""
    options = WatcherOptions(str(tmp_path), "n0", 1, TOKEN, SHORT, serves=True)
    process = start_watcher(options)
    try:
        until(lambda: WatcherNote.read(tmp_path))  # it has read its options
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert b"watchdog" in shown
        assert TOKEN.encode() not in shown
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_of_two_watchers_of_a_host_the_first_stays(tmp_path: Path) -> None:
    """Several ranks may start one at the same time."""
    options = WatcherOptions(str(tmp_path), "n0", 1, TOKEN, SHORT, serves=True)
    first = start_watcher(options)
    try:
        until(lambda: WatcherNote.read(tmp_path))
        assert claim(tmp_path) is None
        assert start_watcher(options).wait(30) == 0
        note = WatcherNote.read(tmp_path)
        assert note is not None and note.pid == first.pid and note.is_alive
        with socket.create_connection(("127.0.0.1", note.port), 10):
            pass
    finally:
        first.kill()
        first.wait()
    assert not note.is_alive
    assert claim(tmp_path) is not None


def test_a_process_with_many_files_can_look_for_messages() -> None:
    """As the process of a test suite or a notebook may have."""
    server = LinkServer(TOKEN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            stack.enter_context(Path("/dev/null").open("rb"))
        friend = connect(("127.0.0.1", server.port), TOKEN, "n3")
        assert friend.fileno() >= 1024
        assert not friend.has_arrived()
        until(lambda: server.receive() or server.links)
        server.send({"stacks": True})
        until(friend.has_arrived)
        assert friend.receive() == [{"stacks": True}]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Activity]]:
    """Two ranks, each on a host: both are this process, which is all that the watchers look at."""
    with ExitStack() as stack:
        opened = []
        for rank in range(2):
            (tmp_path / f"n{rank}").mkdir()
            activity = Activity()
            activity.open(tmp_path / f"n{rank}", rank)
            stack.callback(activity.close)
            opened.append(activity)
        yield opened


def host(tmp_path: Path, number: int, port: int | None = None) -> Watcher:
    options = WatcherOptions(
        folder=str(tmp_path / f"n{number}"),
        host=f"n{number}",
        world_size=2,
        token=TOKEN,
        limits=SHORT,
        leader=("127.0.0.1", port) if port is not None else None,
        serves=port is None,
    )
    return Watcher(WatcherOptions.decode(options.encode()))


def test_a_hang_on_one_host_is_explained_to_the_ranks_of_both(
    tmp_path: Path, ranks: list[Activity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "STACKS_S", 0.5)
    monkeypatch.setattr(watcher, "OTHER_HOSTS_S", 0.0)
    first = host(tmp_path, 0)
    assert first.server is not None
    second = host(tmp_path, 1, first.server.port)
    verdicts: dict[int, HangVerdict] = {}

    def look() -> bool:
        for number, one in ((1, second), (0, first)):
            reports = one.ranks.look()
            verdict = (
                one._report(reports)
                if number
                else one._judge([*reports, *one._receive()])
            )
            if verdict is not None:
                # The first one: it ends a rank, which then looks no more.
                verdicts.setdefault(number, verdict)
        return len(verdicts) == 2

    with (
        ranks[0].collective(Place.ALL_REDUCE, "dp:a"),
        ranks[1].phase(Place.FORWARD_BACKWARD),
    ):
        until(look)
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].rank == 1
    assert verdicts[0].speaker == 0
    assert verdicts[0].sentence.startswith("rank 1 on n1 (pid ")
    assert "waiting for it: rank 0 in all_reduce of dp" in verdicts[0].sentence
    # The stack of the other host's process, which this test runs in.
    assert any("test_channel.py" in line for line in verdicts[0].stack)


def test_a_frozen_watcher_does_not_blame_its_ranks(
    tmp_path: Path, ranks: list[Activity], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = host(tmp_path, 0)
    alone.ranks.look()
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 1000.0)
    (report,) = alone.ranks.look()
    assert report.stalled_s < 10.0
    assert report.gone_s == 0.0


class FakeTracker:
    """A rank that ends when it is killed, or when another one has.

    Args:
        stopped_s: how long it has been stopped: it cannot end by itself.
        waits_for: the rank whose death makes its collective fail.
    """

    descriptor = -1

    def __init__(
        self, report: RankReport, stopped_s: float, waits_for: FakeTracker | None = None
    ) -> None:
        self._report = replace(report, stopped_s=stopped_s)
        self._waits_for = waits_for
        self.is_killed = False

    @property
    def has_left(self) -> bool:
        return self.is_killed or (
            self._waits_for is not None and self._waits_for.is_killed
        )

    def sample(self, now: float) -> None:
        return

    def report(self, now: float) -> RankReport:
        return self._report

    def kill(self) -> None:
        self.is_killed = True


def test_a_rank_that_cannot_end_is_killed_first_so_that_the_others_end_by_themselves(
    tmp_path: Path, ranks: list[Activity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "SPEAK_S", 0.0)
    monkeypatch.setattr(watcher, "KILL_S", 2.0)
    alone = host(tmp_path, 0)
    (report,) = alone.ranks.look()
    stopped = FakeTracker(report, stopped_s=9.0)
    waiting = FakeTracker(report, stopped_s=0.0, waits_for=stopped)
    trackers = {tmp_path / "0": waiting, tmp_path / "1": stopped}
    monkeypatch.setattr(alone.ranks, "_trackers", trackers)
    alone.ranks.end_with(HangVerdict(1, "stopped", "rank 1 is stopped", [], 0))
    assert stopped.is_killed
    assert not waiting.is_killed
