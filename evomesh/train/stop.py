"""Requests to save or to stop a run: a signal on any rank, or a number in the stop file."""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import dataclass, replace

from evomesh.config.user import expand_home
from evomesh.errors import UserError
from evomesh.parallel.build import SharedStore
from evomesh.parallel.exchange import Exchange
from evomesh.train.signals import StopRequest
from evomesh.user_files import read_text

logger = logging.getLogger(__name__)


class StopFile:
    """The file ``ckpt.stop_file_path`` with one number N.

    N > 0: save and stop after step N. N < 0: save after step |N|. 0: no request. Created with a 0 when absent.
    """

    def __init__(self, path: str) -> None:
        self._path = expand_home(path)
        self._last_reported = "0"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not self._path.exists():
                self._path.write_text("0\n")
        except OSError as error:
            raise UserError(
                f"cannot create the stop file: {error.strerror}",
                where=path,
                code="EVO-TRAIN-010",
            ) from None
        if not self._path.is_file():
            raise UserError(
                f"{path} is not a regular file",
                where="ckpt.stop_file_path",
                expected="a file with a step number, or a new name",
                code="EVO-TRAIN-010",
            )

    def read(self) -> int:
        """Return the requested step. Anything that is not a number is ignored with one warning."""
        try:
            if not self._path.exists():
                return 0
            text = read_text(self._path).strip()
            number = int(text or "0")
        except (OSError, ValueError, UserError) as error:
            problem = error.found if isinstance(error, UserError) else str(error)
            if problem != self._last_reported:
                logger.warning(
                    "stop file %s: %s; write a step number, or 0", self._path, problem
                )
            self._last_reported = problem
            return 0
        if text != self._last_reported and number:
            what = "save and stop" if number > 0 else "save"
            logger.warning(
                "stop file %s requests to %s after %d steps",
                self._path,
                what,
                abs(number),
            )
        self._last_reported = text
        return number


@dataclass(frozen=True)
class StopDecision:
    """The action of all ranks after a step."""

    save: bool = False
    stop: bool = False


Boundary = tuple[int, int]  # (step, finished micro-batches of it)


@dataclass(frozen=True)
class StopRegister:
    """The value in the store by which ranks agree when to stop.

    Example: rank 1 has finished two micro-batches of step 7, and none has done more:
    farthest is (7, 2). Then rank 3 receives SIGTERM while it is at (7, 1). It cannot ask
    rank 1 to stop where that rank has been already, so all stop at (7, 3).

    Attributes:
        farthest: the last boundary that any rank has reached.
        stop_at: all ranks stop at the first boundary that is not before it; None: not requested.
        signal: the signal that asked for it, 0 if none did.
        file_number: the number of the stop file, for a boundary that no rank had reached when it was published.
    """

    farthest: Boundary = (-1, 0)
    stop_at: Boundary | None = None
    signal: int = 0
    file_number: int = 0

    @classmethod
    def decode(cls, text: str) -> StopRegister:
        if not text:
            return cls()
        farthest, stop_at, signal_number, file_number = json.loads(text)
        boundary = None if stop_at is None else (stop_at[0], stop_at[1])
        return cls((farthest[0], farthest[1]), boundary, signal_number, file_number)

    def encode(self) -> str:
        return json.dumps([self.farthest, self.stop_at, self.signal, self.file_number])

    def with_file_number(self, number: int, step: int) -> StopRegister:
        """Return the register with a number that rank 0 has just read after ``step`` steps.

        If another rank is past the step that the number names, it holds for the next
        one: otherwise that rank would train while the others save.
        """
        is_current = number != 0 and abs(number) >= step
        if is_current and (abs(number), 0) <= self.farthest:
            farthest_step, _ = self.farthest
            sign = 1 if number > 0 else -1
            number = sign * (farthest_step + 1)
        return replace(self, file_number=number)

    def after_visit(self, here: Boundary, signal_number: int) -> StopRegister:
        """Return the register after a rank has reached ``here``, with the signal that it has received or 0."""
        if self.stop_at is not None:
            return self
        if not signal_number:
            return replace(self, farthest=max(self.farthest, here))
        stop_at = here
        if here <= self.farthest:
            step, micro_batches = self.farthest
            stop_at = (step, micro_batches + 1)
        return replace(self, stop_at=stop_at, signal=signal_number)


class StopBoundary:
    """Agrees on the boundary at which all ranks stop: the first that no rank has reached yet.

    Boundaries are between micro-batches, (step, 1), (step, 2) ..., and before each step,
    (step, 0). Every rank visits every boundary, which is one atomic compare-and-set of
    the register in the store. So no rank passes a boundary at which another stops, and
    no rank waits for another: nothing but the store's answer keeps the host from
    queueing the next work on its device.
    """

    KEY = "evomesh/stop"

    def __init__(self, store: SharedStore) -> None:
        self._store = store
        self._last_seen = ""

    def forget(self) -> None:
        """Start over, if an earlier run of the same processes has used the register."""
        fresh = StopRegister().encode()
        while self._last_seen != fresh:
            self._swap(fresh)

    def visit(
        self,
        here: Boundary,
        signal_number: int = 0,
        file_number: int | None = None,
    ) -> StopRegister:
        """Record that this rank has reached ``here`` and return what the register holds then.

        Args:
            signal_number: the signal that this rank has received, 0 for none.
            file_number: a new number of the stop file; None: as before.
        """
        # Another rank may have written since: then the store answers with what it holds,
        # and the decision is made again from that. Each failure means that another rank
        # succeeded, so no two ranks keep each other from it.
        while True:
            held = StopRegister.decode(self._last_seen)
            wanted = held
            if file_number is not None:
                wanted = wanted.with_file_number(file_number, here[0])
            wanted = wanted.after_visit(here, signal_number)
            if self._swap(wanted.encode()):
                return wanted

    def _swap(self, wanted: str) -> bool:
        """Write the register unless it changed since it was last seen; return whether it is as wanted."""
        held = self._store.compare_set(self.KEY, self._last_seen, wanted)
        self._last_seen = held.decode()
        return self._last_seen == wanted


class StopPoll:
    """Asks all sources of stop requests, without a collective: each rank visits its boundaries in its own time.

    Args:
        path: of the stop file.
        store: where several ranks agree on a boundary; None for a single process.
    """

    def __init__(
        self,
        request: StopRequest,
        path: str | None,
        exchange: Exchange,
        store: SharedStore | None = None,
    ) -> None:
        self._request, self._exchange = request, exchange
        self._file = StopFile(path) if path is not None and exchange.rank == 0 else None
        self._boundary = StopBoundary(store) if store is not None else None
        self._published = 0  # what rank 0 last found in the file
        self._stopped = False

    def before_first_step(self, steps_done: int) -> StopDecision:
        """Return the decision before any step, when the ranks may still wait for each other."""
        if self._boundary is None:
            return self.after_step(steps_done)
        signals = self._exchange.gather(int(self._request.signal or 0))
        if signals is None:
            self._exchange.broadcast(None)
            return self.after_step(steps_done)
        if max(signals):
            self._request.signal = signal.Signals(max(signals))
        self._boundary.forget()
        decision = self.after_step(steps_done)
        self._exchange.broadcast(None)
        return decision

    def after_step(self, steps_done: int) -> StopDecision:
        """Return the same decision on every rank; a signal that reached one rank is then recorded on all."""
        if self._boundary is None:
            file_number = self._read_file()
            stop_requested = self._request.signal is not None
        else:
            register = self._visit(
                self._boundary, (steps_done, 0), self._new_file_number()
            )
            file_number = register.file_number
            stop_requested = self._stopped
        save = file_number != 0 and steps_done == abs(file_number)
        stop = file_number != 0 and steps_done == file_number
        return StopDecision(save, stop or stop_requested)

    def _new_file_number(self) -> int | None:
        """Return the number in the stop file if it has changed since it was last published.

        Rank 0 alone reads the file: a network file system may show it to some ranks a
        step earlier than to others.
        """
        number = self._read_file()
        if number == self._published:
            return None
        self._published = number
        return number

    def _visit(
        self, boundary: StopBoundary, here: Boundary, file_number: int | None = None
    ) -> StopRegister:
        """Visit ``here``; if all ranks stop there, note that, and the signal that asked for it."""
        own_signal = int(self._request.signal or 0)
        register = boundary.visit(here, own_signal, file_number)
        stop_at = register.stop_at
        if stop_at is not None and here >= stop_at:
            self._stopped = True
            asked_by = signal.Signals(register.signal)
            self._request.signal = asked_by
        return register

    def _read_file(self) -> int:
        return self._file.read() if self._file is not None else 0

    def between_micro_batches(self, step: int, micro_batches: int) -> bool:
        """Return whether to interrupt ``step`` now, with ``micro_batches`` of it finished."""
        if self._boundary is None:
            return self._request.signal is not None
        self._visit(self._boundary, (step, micro_batches))
        return self._stopped
