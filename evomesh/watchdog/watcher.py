"""The watcher of one host: a small process without torch that outlives any rank and no run.

It looks at the ranks of its host twice a second. The watcher of rank 0's host has the
reports of all hosts and decides; when it has found a hang, every watcher leaves the
verdict in a file for its ranks, which end with it, and ends those that cannot.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from evomesh.errors import EXIT_RESTART
from evomesh.watchdog import ring
from evomesh.watchdog.activity import remove_record
from evomesh.watchdog.channel import Link, LinkServer, Message, connect
from evomesh.watchdog.diagnosis import HangLimits, RankReport, Suspect, find_suspect
from evomesh.watchdog.explanation import explain, stack_lines
from evomesh.watchdog.process_state import read_state, start_time
from evomesh.watchdog.stacks import Call, Stacks
from evomesh.watchdog.tracker import RankTracker

POLL_S = 0.5
FROZEN_S = 3.0  # a poll that took this long: the host was frozen
STACKS_S = 1.5  # how long a process may take to write its stacks
REMOTE_AGE_S = 5.0  # a host that is silent for longer is unknown
UNSEEN_S = 30.0  # without any rank: they ended before the first look
OTHER_HOSTS_S = 1.0  # for the other hosts to receive a verdict before rank 0 may end
SPEAK_S = 2.5  # for a rank to find the verdict and write the sentence
KILL_S = 8.0  # what a rank has to end by itself, its alerts sent
LOCK_AGE_S = 3.0  # a rank that had Python's lock since then can still end by itself
VERDICT = "verdict.json"
NOTE = "watcher.json"
LOCK = "watcher.lock"


@dataclass(frozen=True)
class WatcherOptions:
    """Options that a rank passes to the watcher that it starts, as a line of JSON.

    Attributes:
        folder: of the ring files.
        world_size: ranks of the job.
        leader: host and port of the watcher of rank 0's host; None for that watcher.
        serves: whether it listens for other hosts.
        token: of the job.
    """

    folder: str
    host: str
    world_size: int
    token: str
    limits: HangLimits
    leader: tuple[str, int] | None = None
    serves: bool = False

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> WatcherOptions:
        value = json.loads(text)
        value["limits"] = HangLimits(**value["limits"])
        leader = value["leader"]
        value["leader"] = (leader[0], int(leader[1])) if leader else None
        return WatcherOptions(**value)


@dataclass(frozen=True)
class HangVerdict:
    """Message of a watcher to the ranks of its host.

    Attributes:
        sentence: the explanation.
        stack: of the rank that is stuck, one line a call.
        speaker: the rank that logs it; -1: no rank can.
    """

    rank: int
    kind: str
    sentence: str
    stack: list[str]
    speaker: int
    exit_code: int = EXIT_RESTART

    def write(self, folder: Path) -> None:
        part = folder / f".{VERDICT}"
        part.write_text(json.dumps(asdict(self)))
        part.replace(folder / VERDICT)

    @staticmethod
    def read(folder: Path) -> HangVerdict | None:
        """Return the verdict for the ranks of this host, None while there is none."""
        try:
            return HangVerdict(**json.loads((folder / VERDICT).read_text()))
        except OSError:
            return None


@dataclass(frozen=True)
class WatcherNote:
    """The note that the watcher of a host leaves beside the records of its ranks, for these to find it.

    Attributes:
        started: start time of its process.
        port: at which it listens for other hosts; 0 if it does not.
    """

    pid: int
    started: int
    port: int = 0

    @property
    def is_alive(self) -> bool:
        return not read_state(self.pid, self.started).has_ended

    def write(self, folder: Path) -> None:
        part = folder / f".{NOTE}"
        part.write_text(json.dumps(asdict(self)))
        part.replace(folder / NOTE)

    @staticmethod
    def read(folder: Path) -> WatcherNote | None:
        """Return the note of this host's watcher, None where none has begun."""
        try:
            return WatcherNote(**json.loads((folder / NOTE).read_text()))
        except OSError:
            return None


def claim(folder: Path) -> int | None:
    """Return a lock that makes this process the watcher of the folder while it lives; None: there is another one."""
    try:
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    return lock


class HostWatcher:
    """The ranks of this host.

    Args:
        folder: of their ring files.
    """

    def __init__(self, folder: Path, host: str) -> None:
        self._folder, self._host = folder, host
        self._trackers: dict[Path, RankTracker] = {}
        self._looked_at = time.monotonic()

    @property
    def has_ranks(self) -> bool:
        """Return whether a rank of this host still runs."""
        return any(not tracker.has_left for tracker in self._trackers.values())

    def look(self) -> list[RankReport]:
        """Take a sample of every rank."""
        now = time.monotonic()
        gap = now - self._looked_at
        self._looked_at = now
        for path in self._ring_files():
            # A file that is being created or removed counts at the next look.
            if path not in self._trackers:
                with contextlib.suppress(OSError):
                    self._trackers[path] = RankTracker(path, self._host, now)
        reports = []
        for tracker in self._trackers.values():
            if gap > FROZEN_S:
                tracker.forgive(gap)
            tracker.sample(now)
            reports.append(tracker.report(now))
        return reports

    def _ring_files(self) -> list[Path]:
        """Return the files of the ranks; none once the last rank has removed the folder."""
        try:
            return sorted(self._folder.glob("*.ring"))
        except OSError:
            return []

    def ask_for_stacks(self) -> None:
        for tracker in self._trackers.values():
            tracker.ask_for_stacks()

    def sleep(self) -> None:
        """Wait until the next look, or until a rank ends."""
        poll = select.poll()
        for tracker in self._trackers.values():
            if tracker.descriptor >= 0 and not tracker.has_left:
                poll.register(tracker.descriptor, select.POLLIN)
        poll.poll(POLL_S * 1000)

    def end_with(self, verdict: HangVerdict) -> None:
        """Let the ranks end with a verdict, and end those that cannot."""
        unable = [t for t, report in self._running() if not is_able(report)]
        verdict.write(self._folder)
        # Not before the sentence is written: collectives with a killed rank fail, and a
        # launcher ends the other ranks.
        self._wait_for_ends(SPEAK_S)
        for tracker in unable:
            tracker.kill()
        self._wait_for_ends(KILL_S)
        for tracker, _ in self._running():
            tracker.kill()

    def _wait_for_ends(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._running():
            self.sleep()

    def _running(self) -> list[tuple[RankTracker, RankReport]]:
        """Return the ranks that have neither ended nor finished their part."""
        now = time.monotonic()
        running = []
        for tracker in self._trackers.values():
            tracker.sample(now)
            if not tracker.has_left:
                running.append((tracker, tracker.report(now)))
        return running

    def remove_files(self) -> None:
        remove_record(self._folder)


class _HostReports(NamedTuple):
    """The newest reports of another host."""

    received_at: float
    reports: list[RankReport]


class Watcher:
    """The loop of the process; see the module."""

    def __init__(self, options: WatcherOptions) -> None:
        self.options = options
        folder = Path(options.folder)
        self.ranks = HostWatcher(folder, options.host)
        self.server = None
        if options.serves:
            self.server = LinkServer(options.token)
        self._leader: Link | None = None
        self._remote: dict[str, _HostReports] = {}
        self._suspected_at: float | None = None

    def run(self) -> None:
        """Watch until the ranks of this host have ended."""
        deadline = time.monotonic() + UNSEEN_S
        seen = False
        while True:
            reports = self.ranks.look()
            verdict = self._report(reports) if self.options.leader else None
            if not self.options.leader:
                verdict = self._judge([*reports, *self._receive()])
            if verdict is not None:
                self.ranks.end_with(verdict)
                return
            seen = seen or bool(reports)
            may_come = not seen and time.monotonic() < deadline
            if not self.ranks.has_ranks and not may_come:
                return
            self.ranks.sleep()

    # As one of several hosts.

    def _report(self, reports: list[RankReport]) -> HangVerdict | None:
        """Send the reports of this host; return the verdict if there is one."""
        link = self._link()
        if link is None:
            return None
        link.send({"reports": [report_to_json(report) for report in reports]})
        while link.has_arrived():
            for message in link.receive():
                if "verdict" in message:
                    return HangVerdict(**message["verdict"])
                if "stacks" in message:
                    self.ranks.ask_for_stacks()
        return None

    def _link(self) -> Link | None:
        """Return the connection to rank 0's host; None where it cannot be reached, which `PeerWatch` judges."""
        if self._leader is None or self._leader.is_closed:
            self._leader = None
            assert self.options.leader is not None
            with contextlib.suppress(OSError):
                self._leader = connect(
                    self.options.leader, self.options.token, self.options.host
                )
        return self._leader

    # As the one that decides.

    def _receive(self) -> list[RankReport]:
        """Return the newest reports of the other hosts."""
        if self.server is None:
            return []
        now = time.monotonic()
        for host, message in self.server.receive():
            reports = [report_from_json(value) for value in message.get("reports", [])]
            self._remote[host] = _HostReports(now, reports)
        found = []
        for received_at, reports in self._remote.values():
            if now - received_at < REMOTE_AGE_S:
                found += reports
        return found

    def _judge(self, reports: list[RankReport]) -> HangVerdict | None:
        """Return the verdict once a rank is suspected, its stack is known and it still makes no progress."""
        ranks = {report.rank for report in reports}
        is_complete = len(ranks) >= self.options.world_size
        suspect = find_suspect(reports, self.options.limits, is_complete)
        now = time.monotonic()
        if suspect is None:
            self._suspected_at = None
            return None
        # Who is suspected may change with the stacks: that another process makes no
        # progress either is what counts.
        if self._suspected_at is None:
            self._suspected_at = now
            self.ranks.ask_for_stacks()
            self._tell({"stacks": True})
            return None
        if now - self._suspected_at < STACKS_S:
            return None
        verdict = self._verdict(suspect, reports)
        self._tell({"verdict": asdict(verdict)})
        if self.server is not None and self.server.links:
            time.sleep(OTHER_HOSTS_S)
        if verdict.speaker < 0:
            lines = [verdict.sentence, *verdict.stack]
            print("\n".join(lines), file=sys.stderr)
        return verdict

    def _tell(self, message: Message) -> None:
        if self.server is not None:
            self.server.send(message)

    def _verdict(self, suspect: Suspect, reports: list[RankReport]) -> HangVerdict:
        sentence = explain(suspect, reports, time.time())
        speaker = choose_speaker(suspect, reports)
        return HangVerdict(
            suspect.report.rank, suspect.kind, sentence, stack_lines(suspect), speaker
        )


def choose_speaker(suspect: Suspect, reports: list[RankReport]) -> int:
    """Return the lowest rank that can still write a line, the suspect only if no other can; -1: none can."""
    able = [report.rank for report in reports if is_able(report)]
    others = [rank for rank in able if rank != suspect.report.rank]
    return min(others or able, default=-1)


def is_able(report: RankReport) -> bool:
    """Return whether a rank can read a verdict and end with it."""
    runs = not report.stopped_s and not report.gone_s and not report.ring.is_ending
    return runs and report.lock_age_s < LOCK_AGE_S


def report_to_json(report: RankReport) -> dict[str, Any]:
    """Return a report as it is sent to another host; the order of collectives only once it may matter."""
    state = report.ring
    is_stalled = report.stalled_s >= FROZEN_S
    if not is_stalled and not state.has_failed_collective:
        state = replace(state, entries=())
    value = dict(vars(report))
    value["ring"] = ring.as_json(state)
    if report.stacks is not None:
        value["stacks"] = asdict(report.stacks)
    return value


def report_from_json(value: dict[str, Any]) -> RankReport:
    """Take back what ``report_to_json`` made."""
    fields = dict(value)
    fields["ring"] = ring.from_json(value["ring"])
    stacks = value["stacks"]
    if stacks is not None:
        fields["stacks"] = _stacks_from_json(stacks)
    return RankReport(**fields)


def _stacks_from_json(stacks: dict[str, Any]) -> Stacks:
    main = _stack_from_json(stacks["main"])
    others = map(_stack_from_json, stacks["others"])
    return Stacks(main, tuple(others))


def _stack_from_json(calls: list[dict[str, Any]]) -> tuple[Call, ...]:
    return tuple(Call(**call) for call in calls)


def main() -> None:
    """Run the watcher of a host.

    The first line of its input is its options: they hold the token of the job, which the
    command line would show to everybody on the host. Several ranks may each start one:
    the first that claims the host stays.
    """
    text = sys.stdin.readline()
    if not text:
        return  # the rank that started it has been killed meanwhile
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its ranks
    os.nice(10)
    options = WatcherOptions.decode(text)
    folder = Path(options.folder)
    if claim(folder) is None:
        return
    watcher = Watcher(options)
    port = watcher.server.port if watcher.server is not None else 0
    with contextlib.suppress(OSError):
        WatcherNote(os.getpid(), start_time(os.getpid()), port).write(folder)
    try:
        watcher.run()
    finally:
        watcher.ranks.remove_files()


if __name__ == "__main__":
    main()
