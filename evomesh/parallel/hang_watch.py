"""This rank's part of the watchdog: its record, the watcher of its host, and the end with a verdict.

A rank of each host starts the watcher, a process that sees what no thread of a
rank could: a stopped process, and one that holds Python's lock. See ``evomesh/watchdog``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed.distributed_c10d import Store

import evomesh
from evomesh.monitor.log import ALL_RANKS
from evomesh.parallel.rank_process import RankProcess, memory_folder
from evomesh.watchdog.activity import remove_old_records, this_process
from evomesh.watchdog.diagnosis import HangLimits
from evomesh.watchdog.watcher import HangVerdict, WatcherNote, WatcherOptions

logger = logging.getLogger(__name__)

BEAT_S = 1.0
START_S = 2.0  # the watcher starts then: a shorter run needs none
NEXT_START_S = (
    2.0  # the next rank of the host starts it then, if the one before could not
)
_LEADER = "watchdog"  # key: port of the watcher of rank 0's host


@dataclass
class HangWatch:
    """Records this rank and ends it with a verdict on a hang; a thread from ``start`` to ``close``.

    Args:
        ranks: the processes of all ranks.
        open_store: returns a connection to the job's store, for several hosts; None for a single process.
        host_of_leader: where the store is, which is rank 0's host.
        end: called with the exit code.
        before_end: called with the sentence on the rank that logs it.
    """

    rank: int
    ranks: dict[int, RankProcess]
    limits: HangLimits
    open_store: Callable[[], Store] | None = None
    host_of_leader: str = ""
    end: Callable[[int], None] = os._exit
    before_end: Callable[[str], None] | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)
    _watcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Open this rank's record and start the thread; log one line where the system cannot do it."""
        if not self._own.machine or not hasattr(os, "pidfd_open"):
            return
        try:
            if self.rank == 0:
                remove_old_records(memory_folder().glob(f"evomesh-{os.getuid()}-*"))
            self._folder.mkdir(mode=0o700, exist_ok=True)
            this_process().open(self._folder, self.rank)
        except OSError as error:
            logger.warning(
                "no watchdog: %s cannot be written (%s)", self._folder, error.strerror
            )
            return
        thread = threading.Thread(
            target=self._watch_until_closed, name="hang watch", daemon=True
        )
        thread.start()

    def close(self) -> None:
        """Stop, and let the watcher know that this rank has finished."""
        self._stopped.set()
        this_process().close()

    @property
    def _own(self) -> RankProcess:
        return self.ranks[self.rank]

    @property
    def _folder(self) -> Path:
        # The token keeps two jobs of one host apart, and strangers from guessing the name.
        return memory_folder() / f"evomesh-{os.getuid()}-{self.ranks[0].token}"

    @property
    def _machines(self) -> list[str]:
        """Return the machines of the job in order of their first rank."""
        return list(dict.fromkeys(process.machine for process in self.ranks.values()))

    @property
    def _start_s(self) -> float:
        """Return when this rank starts the watcher: the first rank of its machine, else the next ..."""
        machine = self._own.machine
        here = [r for r, p in self.ranks.items() if p.machine == machine]
        return START_S + here.index(self.rank) * NEXT_START_S

    def _watch_until_closed(self) -> None:
        begun = time.monotonic()
        is_watched = False
        while not self._stopped.wait(BEAT_S):
            this_process().beat()
            if not is_watched and time.monotonic() - begun >= self._start_s:
                with contextlib.suppress(OSError, RuntimeError):
                    is_watched = self._is_watched()
            verdict = HangVerdict.read(self._folder)
            if verdict is not None:
                self._end_with(verdict)

    def _is_watched(self) -> bool:
        """Return whether this machine has a watcher, which the other machines can find; start one if not.

        The rank that came first may have been stopped while it started one: each rank
        believes only a watcher that runs.
        """
        note = WatcherNote.read(self._folder)
        if note is None or not note.is_alive:
            if self._watcher is None:
                self._start_watcher()
            return False
        if self._serves:
            assert self.open_store is not None
            # Every rank of the machine writes the same.
            self.open_store().set(_LEADER, str(note.port))
        return True

    @property
    def _is_leader(self) -> bool:
        """Return whether the watcher of this machine decides for all."""
        return self._own.machine == self.ranks[0].machine

    @property
    def _serves(self) -> bool:
        """Return whether the watchers of other machines look for that of this one."""
        return self._is_leader and len(self._machines) > 1

    def _start_watcher(self) -> None:
        leader = None
        if not self._is_leader:
            assert self.open_store is not None
            port = int(self.open_store().get(_LEADER))  # waits for rank 0
            leader = (self.host_of_leader, port)
        options = WatcherOptions(
            folder=str(self._folder),
            host=self._own.host,
            world_size=len(self.ranks),
            token=self.ranks[0].token,
            limits=self.limits,
            leader=leader,
            serves=self._serves,
        )
        self._watcher = start_watcher(options)

    def _end_with(self, verdict: HangVerdict) -> None:
        """Log the verdict if this rank is the one that does, and end the process."""
        if verdict.speaker == self.rank:
            lines = "\n".join([verdict.sentence, *verdict.stack])
            logger.error(
                "%s\nending with exit code %d",
                lines,
                verdict.exit_code,
                extra=ALL_RANKS,
            )
            if self.before_end is not None:
                self.before_end(verdict.sentence)
        self.end(verdict.exit_code)


def start_watcher(options: WatcherOptions) -> subprocess.Popen[bytes]:
    """Start the watcher of this host, which ends at once if there is one."""
    # It runs in "/", so that it keeps no folder busy: the package is found by its path.
    search_path = str(Path(evomesh.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    if inherited:
        search_path += os.pathsep + inherited
    watcher = subprocess.Popen(
        [sys.executable, "-m", "evomesh.watchdog.watcher"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env=os.environ | {"PYTHONPATH": search_path},
        start_new_session=True,  # Ctrl-C in a terminal is for the ranks
    )
    assert watcher.stdin is not None
    with watcher.stdin as options_in:
        options_in.write(options.encode().encode() + b"\n")
    return watcher
