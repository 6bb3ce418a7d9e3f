"""Requests to save or to stop a run: a signal on any rank, or a number in the stop file."""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass

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
                f"cannot create the stop file: {error.strerror}", where=path
            ) from None
        if not self._path.is_file():
            raise UserError(
                f"{path} is not a regular file",
                where="ckpt.stop_file_path",
                expected="a file with a step number, or a new name",
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


class StopBoundary:
    """Agrees on the boundary between micro-batches at which all ranks stop: the first that no rank has passed yet.

    One register in the store holds either the farthest boundary that any rank has
    passed, or the boundary to stop at. A rank that is the first at a boundary records
    it as passed; a rank that wants to stop records the boundary after the farthest one.
    Each is one atomic compare-and-set, so no rank passes a boundary at which another
    stops, and no rank waits for another. Only hosts communicate: work that is queued on
    devices keeps running.
    """

    KEY = "evomesh/stop"

    def __init__(self, store: SharedStore) -> None:
        self._store = store
        self._last_seen = ""

    def reached(self, step: int, micro_batches: int, stop_requested: bool) -> bool:
        """Return whether to stop here, with ``micro_batches`` of ``step`` finished.

        Args:
            stop_requested: this rank has received a signal.
        """
        here = (step, micro_batches)
        wanted = self._next_register(self._last_seen, here, stop_requested)
        # Another rank may have written since: then the store answers with what it holds,
        # and the decision is made again from that. Each failure means that another rank
        # succeeded, so no two ranks keep each other from it.
        while not self._write(wanted):
            wanted = self._next_register(self._last_seen, here, stop_requested)
        _, stop_at = _parse_register(wanted)
        return stop_at is not None and here >= stop_at

    def _write(self, wanted: str) -> bool:
        """Write the register unless it changed since it was last seen; return whether it is as wanted."""
        held = self._store.compare_set(self.KEY, self._last_seen, wanted)
        self._last_seen = held.decode()
        return self._last_seen == wanted

    @staticmethod
    def _next_register(register: str, here: Boundary, stop_requested: bool) -> str:
        """Return the register as this rank wants it, given what it holds."""
        farthest, stop_at = _parse_register(register)
        if stop_at is not None:
            return register
        if farthest < here:
            word = "stop" if stop_requested else "passed"
            return f"{word} {here[0]} {here[1]}"
        if stop_requested:
            return f"stop {farthest[0]} {farthest[1] + 1}"
        return register


def _parse_register(register: str) -> tuple[Boundary, Boundary | None]:
    """Return (farthest boundary passed, boundary to stop at if any).

    "passed 7 2" is ((7, 2), None): some rank has finished two micro-batches of step 7,
    and none more. "stop 7 3" is ((7, 2), (7, 3)).
    """
    if not register:
        return (-1, 0), None
    word, *numbers = register.split()
    step, micro_batches = map(int, numbers)
    boundary = (step, micro_batches)
    if word == "passed":
        return boundary, None
    farthest = (step, micro_batches - 1)
    return farthest, boundary


class StopPoll:
    """Asks all sources of stop requests: ``after_step`` on all ranks together, ``between_micro_batches`` on each.

    Args:
        path: of the stop file.
        store: where several ranks agree on a boundary between micro-batches; without one they stop after steps only.
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

    def after_step(self, steps_done: int) -> StopDecision:
        """Return the same decision on every rank; a signal that reached one rank is then recorded on all."""
        signal_number, file_number = self._requests()
        if signal_number:
            self._request.signal = signal.Signals(signal_number)
        save = file_number != 0 and steps_done == abs(file_number)
        stop = file_number != 0 and steps_done == file_number
        return StopDecision(save, stop or bool(signal_number))

    def _requests(self) -> tuple[int, int]:
        """Return (number of a signal that some rank received, number in the stop file), 0 for none."""
        own_signal = int(self._request.signal or 0)
        if self._exchange.size == 1:
            return own_signal, self._read_file()
        signals = self._exchange.gather(own_signal)
        requests = None
        if signals is not None:
            # Rank 0 alone reads the file: a network file system may show it to some
            # ranks a step earlier than to others.
            file_number = self._read_file()
            requests = [max(signals), file_number]
        signal_number, file_number = self._exchange.broadcast(requests)
        return signal_number, file_number

    def _read_file(self) -> int:
        return self._file.read() if self._file is not None else 0

    def between_micro_batches(self, step: int, micro_batches: int) -> bool:
        """Return whether to interrupt ``step`` now, with ``micro_batches`` of it finished."""
        requested = self._request.signal is not None
        if self._exchange.size == 1:
            return requested
        return self._boundary is not None and self._boundary.reached(
            step, micro_batches, requested
        )
