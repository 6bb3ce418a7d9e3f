"""Who may ask a run to save or to stop: a signal on any rank, or a number in the stop file."""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass
from pathlib import Path

from evomesh.errors import UserError
from evomesh.parallel.build import SharedStore
from evomesh.parallel.exchange import Exchange
from evomesh.train.signals import StopRequest

logger = logging.getLogger(__name__)


class StopFile:
    """``ckpt.stop_file_path``: N > 0 saves and stops after step N, N < 0 only saves after step |N|, 0 asks nothing.

    Made with a 0 in it when absent.
    """

    def __init__(self, path: str) -> None:
        self._path, self._said = Path(path), "0"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not self._path.exists():
                self._path.write_text("0\n")
        except OSError as error:
            raise UserError(f"the stop file cannot be made: {error.strerror}", where=path) from None

    def read(self) -> int:
        """The number in it; what is no number asks nothing and is said once."""
        try:
            text = self._path.read_text().strip()
            number = int(text or "0")
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            if str(error) != self._said:
                logger.warning("stop file %s: %s; write the number of a step, or 0", self._path, error)
            self._said = str(error)
            return 0
        if text != self._said and number:
            what = "save and stop" if number > 0 else "save"
            logger.warning("stop file %s asks to %s after %d steps", self._path, what, abs(number))
        self._said = text
        return number


@dataclass(frozen=True)
class StopDecision:
    """What all ranks do now."""

    save: bool = False
    stop: bool = False


class StopPoint:
    """Where between micro-batches all ranks break off: the first place that none has passed yet.

    One register in the store holds the farthest place that any rank has passed, or the place to stop at. A rank that
    passes a place first moves the register there, one that was asked to stop puts the place behind into it, and each
    is one atomic operation: so no rank passes a place at which another stops, and nobody waits for anybody. Hosts
    talk, devices do not: work that is queued on them goes on.
    """

    KEY = "evomesh/stop"

    def __init__(self, store: SharedStore) -> None:
        self._store = store
        self._seen = ""

    def reached(self, step: int, micro_batches: int, wanted: bool) -> bool:
        """Whether to stop here, with ``micro_batches`` of ``step`` done; ``wanted``: a signal came to this rank."""
        here = (step, micro_batches)
        while True:
            passed, stop = _place(self._seen)
            desired = self._seen
            if stop is None and passed < here:
                desired = f"{'stop' if wanted else 'passed'} {step} {micro_batches}"
            elif stop is None and wanted:
                desired = f"stop {passed[0]} {passed[1] + 1}"
            found = self._store.compare_set(self.KEY, self._seen, desired).decode()
            self._seen, agreed = found, found == desired
            if agreed:
                _, stop = _place(found)
                return stop is not None and here >= stop


def _place(register: str) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """(farthest place passed, place to stop at if any) of a register's text."""
    if not register:
        return (-1, 0), None
    word, step, micro_batches = register.split()
    place = int(step), int(micro_batches)
    return (place, None) if word == "passed" else ((place[0], place[1] - 1), place)


class StopPoll:
    """``ask`` after each step, all ranks together; ``in_step`` between micro-batches, each when it gets there.

    Args:
        store: where several ranks agree about the latter; without one, they stop between steps only.
    """

    def __init__(
        self, request: StopRequest, path: str | None, exchange: Exchange, store: SharedStore | None = None
    ) -> None:
        self._request, self._exchange = request, exchange
        self._file = StopFile(path) if path is not None and exchange.rank == 0 else None
        self._point = StopPoint(store) if store is not None else None

    def ask(self, steps_done: int) -> StopDecision:
        """The same answer on every rank; a signal that reached one rank is then noted on all."""
        if self._exchange.size == 1:
            number = self._file.read() if self._file is not None else 0
            return StopDecision(
                steps_done == abs(number) != 0, self._request.signal is not None or steps_done == number != 0
            )
        signals = self._exchange.gather(int(self._request.signal or 0))
        answer = None
        if signals is not None:
            answer = [max(signals), self._file.read() if self._file is not None else 0]
        number_of_signal, number = self._exchange.broadcast(answer)
        if number_of_signal:
            self._request.signal = signal.Signals(number_of_signal)
        return StopDecision(
            steps_done == abs(number) != 0, bool(number_of_signal) or steps_done == number != 0
        )

    def in_step(self, step: int, micro_batches: int) -> bool:
        """Whether to break off ``step`` now, with ``micro_batches`` of it done, since a signal came to some rank."""
        wanted = self._request.signal is not None
        if self._exchange.size == 1:
            return wanted
        return self._point is not None and self._point.reached(step, micro_batches, wanted)
