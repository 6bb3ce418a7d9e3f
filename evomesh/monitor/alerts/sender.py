"""``BackgroundSender``: a thread with a bounded queue that sends what it is given, and never raises."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from evomesh.monitor.alerts.http import DeliveryError

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Seconds before an item that did not arrive is sent again.
PAUSES_S = (1.0, 4.0)


class BackgroundSender(Generic[T]):
    """Sends items in their order, one at a time, on a thread that starts with the first of them.

    Args:
        name: of the receiver, for the one warning that it cannot be reached.
        send: called on the thread; raises ``DeliveryError`` or ``OSError`` for an item that did not arrive.
        capacity: items that may wait; a further one replaces the oldest.
        pauses: seconds before each repetition of an item that did not arrive.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[T], object],
        capacity: int = 64,
        pauses: Sequence[float] = PAUSES_S,
    ) -> None:
        self.name = name
        self._send = send
        self._pauses = pauses
        self._waiting: deque[T] = deque(maxlen=capacity)
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_sending = False
        self._has_failed = False
        self._thread: threading.Thread | None = None

    def put(self, item: T) -> None:
        """Leave an item to be sent; returns at once."""
        with self._changed:
            if self._is_closing:
                return
            self._waiting.append(item)
            if self._thread is None:
                # A daemon: a receiver that hangs must not keep the process.
                self._thread = threading.Thread(
                    target=self._run, name=f"sender of {self.name}", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def close(self, deadline: float) -> None:
        """Send what waits, until a time of ``time.monotonic``, and log what was not sent by then."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        thread = self._thread
        if thread is None:
            return
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            unsent = len(self._waiting) + int(self._is_sending)
            logger.warning("%s: %d not sent before the end", self.name, unsent)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_sending = False
                while not self._waiting and not self._is_closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                item = self._waiting.popleft()
                self._is_sending = True
            self._deliver(item)

    def _deliver(self, item: T) -> None:
        """Send one item, again after a while if it did not arrive."""
        for pause in (*self._pauses, None):
            reason = self._attempt(item)
            if reason is None:
                return
            is_last = pause is None or reason.is_final
            if is_last or not self._pause(pause or 0.0):
                self._warn(reason)
                return

    def _attempt(self, item: T) -> DeliveryError | None:
        """Send one item and return why it did not arrive, None if it did."""
        try:
            self._send(item)
        except DeliveryError as error:
            return error
        except OSError as error:
            return DeliveryError(error.strerror or type(error).__name__)
        except Exception as error:
            # A custom channel's bug ends neither the thread nor the run. Its text may
            # contain a secret.
            return DeliveryError(f"{type(error).__name__} was raised", is_final=True)
        return None

    def _pause(self, seconds: float) -> bool:
        """Wait between two attempts; return False when the sender is closing, which has no time for another."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing, seconds)
            return not self._is_closing

    def _warn(self, reason: DeliveryError) -> None:
        if self._has_failed:
            return
        self._has_failed = True
        logger.warning(
            "%s: cannot send: %s; training continues, and further failures of it are not logged",
            self.name,
            reason,
        )
