"""Follow one rank of this host: its ring file and its process, from sample to sample."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from pathlib import Path
from statistics import median

from evomesh.watchdog import ring
from evomesh.watchdog.activity import MAIN_STACK_SIGNAL, STACK_SIGNAL
from evomesh.watchdog.diagnosis import RankReport
from evomesh.watchdog.process_state import ProcessState, read_state
from evomesh.watchdog.ring import RingState
from evomesh.watchdog.stacks import parse_stacks

STEPS = 32  # of which the median is taken
SETTLE_S = 1.0  # for background threads to finish what they were doing


class RankTracker:
    """Samples of a rank of this host.

    Args:
        path: of its ring file, which is kept open: its last state can be read after its end.

    Attributes:
        descriptor: of the process; readable once it has ended.
    """

    def __init__(self, path: Path, host: str, now: float) -> None:
        self._host = host
        self._stack_path = path.with_suffix(".stack")
        self._file = path.open("rb")
        self._stacks = self._stack_path.open("rb")
        self.state = self._read()
        self.descriptor = self._open_process()
        self._changed_at = now
        self._stopped_at = now
        self._gone_at = now
        self._settled_at = now
        self._cpu_when_settled = 0.0
        self._process = ProcessState("S")
        self._step_at = now
        self._step_seconds: deque[float] = deque(maxlen=STEPS)
        self._stacks_asked = False

    def _open_process(self) -> int:
        try:
            return os.pidfd_open(self.state.pid)
        except OSError:
            return -1

    @property
    def has_left(self) -> bool:
        """Return whether the rank has ended or is about to."""
        return self.state.is_ending or self._process.has_ended

    def sample(self, now: float) -> None:
        """Look at the rank."""
        earlier = self.state
        self.state = self._read()
        self._process = read_state(self.state.pid, self.state.started)
        if self.state.events != earlier.events:
            self._changed_at = now
            self._stacks_asked = False
        if now - self._changed_at <= SETTLE_S:
            self._settled_at = now
            self._cpu_when_settled = self._process.cpu_s
        steps = self.state.steps_done - earlier.steps_done
        if steps > 0:
            self._step_seconds.append((now - self._step_at) / steps)
            self._step_at = now
        if not self._process.is_stopped:
            self._stopped_at = now
        if not self._process.has_ended:
            self._gone_at = now

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which this watcher itself was frozen, and with it probably the host."""
        self._changed_at += seconds
        self._settled_at += seconds
        self._stopped_at += seconds
        self._gone_at += seconds
        self._step_at += seconds

    def ask_for_stacks(self) -> None:
        """Let the process write its Python stacks, unless it has since its last progress."""
        if self._stacks_asked or self._process.is_stopped or self.descriptor < 0:
            return
        self._stacks_asked = True
        self._stacks.seek(0, os.SEEK_END)
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.descriptor, STACK_SIGNAL)
            signal.pidfd_send_signal(self.descriptor, MAIN_STACK_SIGNAL)

    def kill(self) -> None:
        """End the process, unless it has ended."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)

    def report(self, now: float) -> RankReport:
        """Return what is known of the rank."""
        stalled = now - self._changed_at
        used = self._process.cpu_s - self._cpu_when_settled
        settled = now - self._settled_at
        typical = median(self._step_seconds) if self._step_seconds else 0.0
        background = self.state.background
        stacks = None
        if self._stacks_asked:
            position = self._stacks.tell()
            text = self._stacks.read().decode(errors="replace")
            self._stacks.seek(position)
            if text.strip():
                stacks = parse_stacks(text, self.state.main_thread)
        return RankReport(
            host=self._host,
            ring=self.state,
            process=self._process.state,
            stalled_s=stalled,
            stopped_s=now - self._stopped_at,
            gone_s=now - self._gone_at,
            cpu_share=used / settled if settled > 0 else 1.0,
            lock_age_s=now - self.state.beat_at,
            median_step_s=typical,
            background_s=now - background.since if background else 0.0,
            stacks=stacks,
        )

    def _read(self) -> RingState:
        state = ring.read_ring(os.pread(self._file.fileno(), ring.SIZE, 0))
        if state is None:
            raise OSError("the ring file is not complete")
        return state
