"""The web server around an app: connections that cannot hold others up, and an end without broken streams.

A connection waits for its client while a request, or a part of one, has not arrived.
Such waiting is bounded in time (``HEADER_SECONDS`` here, ``BODY_SECONDS`` in
``requests.py``) and in number: if too many connections wait, the one that has waited
longest is closed for each new one. A client that stops reading its answer is given
``SEND_SECONDS``.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from evomesh.errors import UserError

READ_BYTES = 2**14  # that one turn of the event loop takes from a connection
HEADER_SECONDS = 10.0
SEND_SECONDS = 20.0  # in which a client reads at least some of an answer
MAX_WAITING = 512
SWITCH_SECONDS = 0.0005  # after which a thread gives way to another
SHARE_OF_FILES = 4  # waiting connections take at most one in so many of the files that the process may open
STOP_SECONDS = 5.0  # in which answers in progress may finish after a signal
CLOSE_SECONDS = 1.0  # then, in which clients may read that their answers were ended


class BoundedProtocol(H11Protocol):
    """One connection, which is closed if its request headers do not arrive in time."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waiting_since: float | None = None
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # A read of asyncio's usual 256 KiB may hold 40,000 chunks of one byte each,
        # whose parsing would keep all other connections waiting for half a second.
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        self._follow_waiting()
        # Too many wait, this one included: the one that has waited longest makes room.
        waiting: dict[BoundedProtocol, float] = {}
        for connection in self.connections:
            if not isinstance(connection, BoundedProtocol):
                continue
            if connection.waiting_since is not None:
                waiting[connection] = connection.waiting_since
        if len(waiting) > max_waiting():
            longest = min(waiting, key=waiting.__getitem__)
            longest.close_waiting()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow_waiting()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()
        self._follow_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def _follow_waiting(self) -> None:
        """Keep the time since which the client is waited for, and the timer of request headers."""
        has_request = self.cycle is not None and not self.cycle.response_complete
        is_waiting = not has_request or self.cycle.more_body
        if not is_waiting:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = time.monotonic()
        if has_request:
            self._stop_header_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(
                HEADER_SECONDS, self._end_header_wait
            )

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _end_header_wait(self) -> None:
        """Close the connection, unless its client is still reading the last answer."""
        self._header_timer = None
        if self.transport.get_write_buffer_size():
            self._watch_sending()
        else:
            self.close_waiting()

    def _watch_sending(self) -> None:
        """Close the connection if the client reads nothing of what was written for ``SEND_SECONDS``."""
        self._stop_send_timer()
        unsent = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(
            SEND_SECONDS, self._check_progress, unsent
        )

    def _check_progress(self, unsent_before: int) -> None:
        self._send_timer = None
        unsent = self.transport.get_write_buffer_size()
        if unsent >= unsent_before:
            self.close_waiting()
        elif unsent:
            self._watch_sending()
        else:
            self._follow_waiting()

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def close_waiting(self) -> None:
        """Close the connection without an answer; it no longer counts as waiting."""
        self.waiting_since = None
        self._stop_header_timer()
        self.transport.abort()


def max_waiting() -> int:
    """Return how many connections may wait for their clients at the same time."""
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files == resource.RLIM_INFINITY:
        return MAX_WAITING
    return max(1, min(MAX_WAITING, open_files // SHARE_OF_FILES))


class GracefulServer(uvicorn.Server):
    """A server whose answers in progress end with an error event if they do not finish in time after a signal.

    Args:
        end_answers: ends them; called on the event loop.
    """

    def __init__(
        self, settings: uvicorn.Config, end_answers: Callable[[], None]
    ) -> None:
        super().__init__(settings)
        self._end_answers = end_answers

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal; threads that compute give way to the event loop sooner than usual."""
        usual = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        # A body of many objects makes Python search all objects for garbage, which
        # takes 0.25 s with those of all imported modules; these are exempt from here on.
        gc.freeze()
        try:
            await super().serve(sockets)
        finally:
            gc.unfreeze()
            sys.setswitchinterval(usual)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn alone would wait for all answers, or drop them without a word. Here
        # they may finish, then end with an error event, then their connections close.
        loop = asyncio.get_running_loop()
        ending = loop.call_later(STOP_SECONDS, self._end_answers)
        closing = loop.call_later(STOP_SECONDS + CLOSE_SECONDS, self._close_connections)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            closing.cancel()

    def _close_connections(self) -> None:
        """Close what is still open: clients that do not read, and streams of the page."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def create_server(app: FastAPI, end_answers: Callable[[], None]) -> GracefulServer:
    """Create the server of an app.

    Args:
        end_answers: as in ``GracefulServer``.
    """
    settings = uvicorn.Config(
        app,
        loop="asyncio",
        http=BoundedProtocol,
        ws="none",
        log_level="error",  # its warnings are of what clients sent
        access_log=False,
        limit_concurrency=1024,
        timeout_graceful_shutdown=int(STOP_SECONDS + CLOSE_SECONDS) + 2,
        lifespan="on",
    )
    return GracefulServer(settings, end_answers)


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 picks a free one.

    Raises:
        UserError: the address is in use or not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error})",
            where="--port",
            fix="choose another port, or 0 for any free one",
            code="EVO-SERVE-001",
        ) from None
    # Connections inherit it. Without it, each answer on a kept connection waits for the
    # client's delayed acknowledgment, some 40 ms; asyncio sets it for sockets of an
    # explicit protocol only.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
