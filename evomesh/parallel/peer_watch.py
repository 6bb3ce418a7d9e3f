"""Notice a rank that died, froze or failed, name it, and end the other ranks with one exit code.

Each rank has one thread that writes a heartbeat to the job's store every second, on CPU
and CUDA alike, whatever the main thread waits for. Rank 0 looks at all heartbeats,
every other rank at that of rank 0 (1,024 ranks cost the store 2,048 small operations a
second). Whoever finds a rank lost writes a verdict; all ranks read it and end with it,
so that all of them name the same rank.

    alive ──silent 8 s──> named in the log ──silent 30 s, or a stop was requested, or a collective failed──> lost
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import Store

from evomesh.errors import EXIT_RESTART, UserError
from evomesh.monitor.log import ALL_RANKS
from evomesh.parallel.rank_process import RankProcess
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import COLLECTIVE_FAILED, HAS_VERDICT

logger = logging.getLogger(__name__)

BEAT_S = 1.0
SILENT_S = 8.0  # a rank is named
SUSPECT_SILENT_S = 4.0  # the same once a collective has failed, which is what a killed rank does to its neighbors
LOST_S = 30.0  # the job ends: a short freeze (swap, a migrated machine) is survived
# How long a rank whose collective failed waits for the name of the lost one.
NAMING_LIMIT_S = 14.0
LINGER_S = 10.0  # the store ends with rank 0, which leaves the others time to read the verdict, on busy machines too
DONE = b"done"
# keys
_VERDICT, _READERS, _LEFT, _SUSPICION = ("verdict", "readers", "left", "suspicion")


@dataclass(frozen=True)
class Verdict:
    """Why the job ends: read by every rank.

    Attributes:
        rank: the one that was lost or failed.
        sentence: names it and its host.
        exit_code: of all ranks.
        message: the error that this rank prints; "" for a lost rank, which prints nothing.
    """

    rank: int
    sentence: str
    exit_code: int
    message: str = ""

    def publish(self, store: Store) -> Verdict:
        """Write this verdict into the job's store unless there is one; return the one that stands."""
        return Verdict(
            **json.loads(store.compare_set(_VERDICT, "", json.dumps(asdict(self))))
        )

    @staticmethod
    def read(store: Store) -> Verdict | None:
        """Return the verdict in the job's store, None while the job runs."""
        return (
            Verdict(**json.loads(store.get(_VERDICT)))
            if store.check([_VERDICT])
            else None
        )


class PeerFailedError(UserError):
    """Another rank was lost or failed, and this one ends with it."""

    def __init__(self, verdict: Verdict) -> None:
        restart = verdict.exit_code == EXIT_RESTART
        fix = (
            "rerun the same command; it resumes from the newest checkpoint"
            if restart
            else ""
        )
        super().__init__(
            verdict.sentence,
            fix=fix,
            exit_code=verdict.exit_code,
            code="EVO-PARALLEL-005",
        )


def failed(rank: int, host: str, message: str, exit_code: int) -> Verdict:
    """Return the verdict of a rank that ends with an error."""
    first_line = message.partition("\n")[0]
    return Verdict(
        rank, f"rank {rank} on {host} ended: {first_line}", exit_code, message
    )


def acknowledge(store: Store) -> None:
    """Tell rank 0 that this rank has read the verdict."""
    store.add(_READERS, 1)


def wait_for_readers(store: Store, world_size: int, limit_s: float) -> None:
    """Keep the store, which ends with this process, until all ranks but the verdict's own have read the verdict."""
    deadline = time.monotonic() + limit_s
    with contextlib.suppress(RuntimeError):
        while store.add(_READERS, 0) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


class Heartbeats:
    """When each of some ranks was last heard of, by the clock of this process.

    Args:
        ranks: the ones to listen to.
        now: the time.
    """

    def __init__(self, ranks: range | list[int], now: float) -> None:
        self._values = dict.fromkeys(ranks, b"")
        self._changed = dict.fromkeys(ranks, now)

    @property
    def ranks(self) -> list[int]:
        """The ranks that have not signed off."""
        return [rank for rank, value in self._values.items() if value != DONE]

    def has_heard(self, rank: int) -> bool:
        """Return whether a rank has ever been heard of."""
        return self._values[rank] != b""

    def hear(self, beats: Mapping[int, bytes], now: float) -> None:
        """Take in the newest heartbeats."""
        for rank, value in beats.items():
            if value != self._values[rank]:
                self._values[rank], self._changed[rank] = value, now

    def silence(self, now: float) -> dict[int, float]:
        """Return the seconds since each rank was last heard of; not of those that have signed off."""
        return {rank: now - self._changed[rank] for rank in self.ranks}


class PeerWatch:
    """The heartbeat of this rank and its view of the others; a background thread from ``start`` to ``stop``.

    Args:
        store: a connection that nothing else uses.
        hosts: of all ranks.
        end: called in the thread with the verdict that ends this process.
        stop_requested: whether a signal has asked this rank to stop, which a frozen peer must not delay.
        processes: of all ranks.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        hosts: dict[int, str],
        *,
        end: Callable[[Verdict], None] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        processes: Mapping[int, RankProcess] | None = None,
    ) -> None:
        self.rank, self.hosts = rank, hosts
        self.processes = dict(processes or {})
        self._store = store
        self._end = end or end_process
        self._stop_requested = stop_requested
        # Called with the verdict's sentence before ``end``.
        self.before_end: Callable[[str], None] | None = None
        others = [other for other in hosts if other != rank]
        self._heartbeats = Heartbeats(others if rank == 0 else [0], time.monotonic())
        self._named: set[int] = set()
        self._verdict: Verdict | None = None
        self._has_verdict = threading.Event()
        self._collective_failed = threading.Event()
        self._stopped = threading.Event()
        self._last_round = time.monotonic()
        self._threads = [
            threading.Thread(
                target=self._beat_until_stopped, name="heartbeat", daemon=True
            ),
            threading.Thread(
                target=self._guard_until_stopped, name="heartbeat guard", daemon=True
            ),
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def sign_off(self) -> None:
        """Stop: this rank has finished. Rank 0, with which the store ends, waits for the others."""
        others = len(self.hosts) - 1
        with contextlib.suppress(RuntimeError):
            if self.rank != 0:
                self._store.add(_LEFT, 1)
            else:
                while self._store.add(_LEFT, 0) < others:
                    time.sleep(0.02)
        self._stopped.set()
        self._threads[0].join(2 * BEAT_S)

    def announce(self, message: str, exit_code: int) -> Verdict:
        """Tell the other ranks the error that this one ends with; return the verdict that stands."""
        this_process().set_flag(HAS_VERDICT)
        return self._publish(
            failed(self.rank, self.hosts[self.rank], message, exit_code)
        )

    def announce_and_linger(self, exit_code: int, sentence: str) -> None:
        """Tell the other ranks that a signal ends this one, and let them read it."""
        self.announce(sentence, exit_code)
        self.linger()

    def name_lost_rank(self, limit_s: float = NAMING_LIMIT_S) -> Verdict | None:
        """Wait until the rank is known that made a collective of this rank fail; None when none is found."""
        this_process().set_flag(COLLECTIVE_FAILED)
        with contextlib.suppress(RuntimeError):
            self._store.set(_SUSPICION, str(self.rank))
        self._collective_failed.set()
        self._has_verdict.wait(limit_s)
        return self._verdict

    def linger(self) -> None:
        """Let the others read the verdict before the store ends with this process."""
        if self.rank == 0:
            wait_for_readers(self._store, len(self.hosts), LINGER_S)

    def _beat_until_stopped(self) -> None:
        number = 0
        # The guard notices a store that has gone.
        with contextlib.suppress(RuntimeError):
            while not self._stopped.wait(BEAT_S if number else 0):
                number += 1
                self._store.set(f"alive/{self.rank}", str(number))
                self.listen()
                self._last_round = time.monotonic()
            self._store.set(f"alive/{self.rank}", DONE.decode())

    def listen(self) -> None:
        """Read the heartbeats and the verdict once, and decide."""
        ranks = self._heartbeats.ranks
        present = [rank for rank in ranks if self._has_beaten(rank)]
        beats = (
            self._store.multi_get([f"alive/{rank}" for rank in present])
            if present
            else []
        )
        now = time.monotonic()
        self._heartbeats.hear(dict(zip(present, beats, strict=True)), now)
        verdict = Verdict.read(self._store)
        if verdict is not None:
            self._accept(verdict)
        else:
            if self._store.check([_SUSPICION]):
                self._collective_failed.set()
            self._judge(self._heartbeats.silence(now))

    def _has_beaten(self, rank: int) -> bool:
        """Return whether a rank has a heartbeat to read; asked of the store until it has."""
        return self._heartbeats.has_heard(rank) or self._store.check([f"alive/{rank}"])

    def _judge(self, silence: dict[int, float]) -> None:
        """Name the silent ranks, and find one lost."""
        # 1. Whoever has been silent for a while is named once, and once more when it
        #    answers again. After a failed collective one is suspected sooner.
        limit = SUSPECT_SILENT_S if self._collective_failed.is_set() else SILENT_S
        for rank, seconds in silence.items():
            if seconds >= limit and rank not in self._named:
                self._named.add(rank)
                logger.warning(
                    "%s has not answered for %.0f s",
                    self._describe(rank),
                    seconds,
                    extra=ALL_RANKS,
                )
            elif seconds < limit and rank in self._named:
                self._named.discard(rank)
                logger.warning(
                    "%s answers again", self._describe(rank), extra=ALL_RANKS
                )

        # 2. One that stays silent is lost. When this process is about to end anyway,
        #    the one silent for longest is named without waiting.
        if not self._named:
            return
        longest = max(self._named, key=lambda rank: silence[rank])
        gives_up = self._collective_failed.is_set() or self._stop_requested()
        if gives_up or silence[longest] >= LOST_S:
            self._publish(self._lost(longest, silence[longest]))

    def _lost(self, rank: int, seconds: float) -> Verdict:
        sentence = (
            f"{self._describe(rank)} is lost: it{self._pid(rank)} has not answered for {seconds:.0f} s (killed, "
            "frozen, or its node is down)"
        )
        return Verdict(rank, sentence, EXIT_RESTART)

    def _describe(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def _pid(self, rank: int) -> str:
        process = self.processes.get(rank)
        return f" (pid {process.pid})" if process is not None else ""

    def _publish(self, verdict: Verdict) -> Verdict:
        """Write a verdict unless there is one; return the one that stands."""
        standing = verdict
        with contextlib.suppress(RuntimeError):
            standing = verdict.publish(self._store)
        self._accept(standing)
        return standing

    def _accept(self, verdict: Verdict) -> None:
        """Acknowledge a verdict and end with it."""
        if self._has_verdict.is_set():
            return
        # The rank of the verdict is lost or wrote it: all others count as its readers.
        if verdict.rank != self.rank:
            with contextlib.suppress(RuntimeError):
                acknowledge(self._store)
        self._accept_without_store(verdict)

    def _accept_without_store(self, verdict: Verdict) -> None:
        """End with a verdict: the main thread if it asks for it soon, else the process."""
        if self._has_verdict.is_set():
            return
        this_process().set_flag(HAS_VERDICT)
        self._verdict = verdict
        self._has_verdict.set()
        is_a_watcher = threading.current_thread() in self._threads
        if verdict.rank != self.rank or is_a_watcher:
            threading.Thread(
                target=self._end_soon,
                args=(verdict,),
                name="end of job",
                daemon=True,
            ).start()

    def _end_soon(self, verdict: Verdict) -> None:
        """Leave the main thread a moment to end with the same verdict in its own words, then end the process."""
        if self._stopped.wait(LINGER_S + BEAT_S):
            return
        if self.before_end is not None:
            self.before_end(verdict.sentence)
        self._end(verdict)

    def _guard_until_stopped(self) -> None:
        """Find the store lost, whose calls may never return when its host is frozen."""
        woke = time.monotonic()
        while not self._stopped.wait(BEAT_S):
            fell_asleep = woke
            woke = time.monotonic()
            if woke - fell_asleep > SILENT_S / 2:
                self._last_round = woke  # this process itself was frozen
            silent_for = woke - self._last_round
            limit = SILENT_S
            if self._collective_failed.is_set():
                limit = SUSPECT_SILENT_S
            if silent_for >= limit and not self._has_verdict.is_set():
                self._judge_store(silent_for)

    def _judge_store(self, silent_for: float) -> None:
        """Name rank 0, on whose node the store is, and find it lost."""
        is_gone = not self._threads[0].is_alive()  # its connection broke
        if 0 not in self._named and not is_gone:
            self._named.add(0)
            logger.warning(
                "%s, or the job's store on it, has not answered for %.0f s",
                self._describe(0),
                silent_for,
                extra=ALL_RANKS,
            )
        gives_up = self._collective_failed.is_set() or self._stop_requested()
        if gives_up or is_gone or silent_for >= LOST_S:
            self._accept_without_store(self._lost(0, silent_for))


def end_process(verdict: Verdict) -> None:
    """End this process at once: its main thread waits for a rank that will never answer."""
    logger.error(
        "%s; ending with exit code %d",
        verdict.sentence,
        verdict.exit_code,
        extra=ALL_RANKS,
    )
    os._exit(verdict.exit_code)
