"""Signals that end a run: recorded for the training loop, and answered at once while there is nothing to save."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, TypeAlias

from evomesh.errors import EXIT_INTERRUPTED, EXIT_RESTART

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SUPERVISOR = "EVOMESH_SUPERVISOR"  # variable: process that starts this one again
_PR_SET_PDEATHSIG = 1
_Handlers: TypeAlias = dict[signal.Signals, Any]
SECOND_CTRL_C_S = 5.0  # seconds that a second Ctrl-C leaves to the main thread
IMPORTS_S = 20.0  # how long a rank that is stopped while it imports torch waits until it can tell the others


def end_with_supervisor() -> None:
    """Let the kernel send SIGTERM, on which a run saves, when the ``evomesh run`` that started this process dies.

    Otherwise the run would train on alone, and the next supervisor start a second one.
    """
    if os.environ.get(SUPERVISOR) != str(os.getppid()):
        return
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def signals_held_for_next_program() -> Iterator[None]:
    """Let signals wait while the ``with`` block replaces this program, until the next one watches for them.

    Between the two programs there are no handlers: a signal would end the process with
    none of the documented exit codes.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)


class StopRequest:
    """The first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP of this process; a second Ctrl-C interrupts immediately.

    Until the ``with`` block is entered there is nothing to save, and a signal ends the
    process with its exit code. From then on it is only recorded: the training loop asks
    for it, saves and ends. The same holds once an error ends the process. The handlers
    of a command stay to its end, so that a signal in its last moments does not change
    its exit code.

    Python runs handlers in the main thread, between two bytecodes, and therefore not
    while that thread waits in a collective or loads a library. Hence a background
    thread listens too: Python's C handler writes each signal's number to a pipe,
    whatever the main thread does.

    Once another part of the program takes a signal's handler, that signal is its own:
    torch's agent does so when it starts the ranks.

    Args:
        is_rank: other ranks, if there are any, hear of a signal before it ends the process.

    Attributes:
        signal: the first one, None so far.
        before_end: called with (exit code, sentence) before a signal ends the process: how other ranks hear of it.
    """

    def __init__(self, *, is_rank: bool = True) -> None:
        self._is_rank = is_rank
        self.signal: signal.Signals | None = None
        self.before_end: Callable[[int, str], None] | None = None
        self._is_recorded_only = False
        self._was_handled = False  # by the main thread
        self._watches = False
        self._restores_on_exit = False
        self._previous_handlers: _Handlers = {}
        self._previous_wakeup = -1

    @staticmethod
    def installed() -> StopRequest | None:
        """Return the one that this process's signals go to, if there is any."""
        owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        return owner if isinstance(owner, StopRequest) else None

    def watch(self) -> StopRequest:
        """Receive the signals from now on. Does nothing outside the main thread, where Python delivers none."""
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._previous_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(
            target=self._listen, args=(reader,), name="signals", daemon=True
        ).start()
        for number in WATCHED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run outlives its terminal
            self._previous_handlers[number] = signal.signal(number, self._record)
        # What `signals_held_for_next_program` held is delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        self._watches = True
        return self

    def __enter__(self) -> StopRequest:
        if not self._watches:
            self.watch()
            self._restores_on_exit = True
        self.only_record()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._restores_on_exit:
            self.restore()

    def only_record(self) -> None:
        """Leave the end of the process to its main thread: it saves first, or has an error to print.

        Torchrun sends SIGTERM to all ranks as soon as one of them has ended.
        """
        self._is_recorded_only = True

    def restore(self) -> None:
        """Give the signals back to whoever had them before ``watch``."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if self._watches:
            signal.set_wakeup_fd(self._previous_wakeup)
        self._previous_handlers.clear()
        self._watches = False

    def _record(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread."""
        if self._was_handled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._was_handled = True
        self.signal = self.signal or signal.Signals(number)

    def _listen(self, reader: int) -> None:
        """Handle signals in a background thread."""
        ctrl_c = 0
        while numbers := os.read(reader, 64):
            for number in numbers:
                if signal.getsignal(number) != self._record:
                    continue
                ctrl_c += number == signal.SIGINT
                # The main thread may be in a collective.
                self.signal = self.signal or signal.Signals(number)
                if not self._is_recorded_only:
                    self._end(signal.Signals(number))
                if ctrl_c > 1:
                    # The main thread raises KeyboardInterrupt, unless it is stuck.
                    time.sleep(SECOND_CTRL_C_S)
                    os._exit(EXIT_INTERRUPTED)

    def _end(self, received: signal.Signals) -> None:
        """End the process, whose main thread may be anywhere: nothing has been written that could be torn."""
        code = exit_code(received)
        sentence = (
            f"stopped by {received.name} before the first step; rerun the same command"
        )
        self._tell_peers(code, sentence)
        with contextlib.suppress(OSError):
            # Not print: the main thread may hold the stream's lock.
            os.write(2, f"{sentence}\n".encode())
        os._exit(code)

    def _tell_peers(self, code: int, sentence: str) -> None:
        """Let the other ranks know, as soon as the main thread has imported what that takes."""
        has_peers = self._is_rank and _is_one_of_several(os.environ)
        if not has_peers:
            return
        deadline = time.monotonic() + IMPORTS_S
        while self.before_end is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.before_end is not None:
            self.before_end(code, sentence)

    @property
    def exit_code(self) -> int:
        """The exit code of a run that the recorded signal stopped."""
        return exit_code(self.signal)


def exit_code(received: signal.Signals | None) -> int:
    """Return 130 for Ctrl-C, 75 ("start me again") for the signals of schedulers and terminals."""
    return EXIT_INTERRUPTED if received == signal.SIGINT else EXIT_RESTART


def _is_one_of_several(env: Mapping[str, str]) -> bool:
    """Return whether a launcher has started this process as one of several ranks."""
    sizes = []
    if "LOCAL_RANK" in env:
        sizes.append(env.get("WORLD_SIZE", ""))
    if "SLURM_STEP_ID" in env:
        sizes.append(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NPROCS", ""))
    return any(size.isdigit() and int(size) > 1 for size in sizes)
