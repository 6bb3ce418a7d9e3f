"""A client that reads its answer slowly gets all of it; one that reads nothing any more is closed.

The clock, the event loop and the transport are the test's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn

from evomesh.serve.http_server import HEADER_SECONDS, SEND_SECONDS, BoundedProtocol

REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


class Timer:
    def __init__(self, due: float, call: Callable[[], Any]) -> None:
        self.due = due
        self.call = call

    def cancel(self) -> None:
        self.due = float("inf")


class Loop:
    """An event loop whose time the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.tasks: list[Any] = []

    def call_later(self, delay: float, call: Callable[..., Any], *given: Any) -> Timer:
        timer = Timer(self.now + delay, lambda: call(*given))
        self.timers.append(timer)
        return timer

    def create_task(self, work: Any, **options: Any) -> Any:
        work.close()
        self.tasks.append(work)
        return self

    def add_done_callback(self, call: Callable[..., Any]) -> None:
        """Accept what a task is asked for; none of them ends."""

    def move(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due = [timer for timer in self.timers if timer.due <= end]
            if not due:
                break
            timer = min(due, key=lambda timer: timer.due)
            self.timers.remove(timer)
            self.now = timer.due
            timer.call()
        self.now = end


class Transport:
    """A connection whose client reads as the test says."""

    def __init__(self) -> None:
        self.unsent = 0
        self.is_open = True

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return not self.is_open

    def write(self, data: bytes) -> None:
        self.unsent += len(data)

    def close(self) -> None:
        """Wait for what is unsent, as a real one does."""

    def abort(self) -> None:
        self.is_open = False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Connection:
    """A connection that has sent one request."""

    def __init__(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            pass

        config = uvicorn.Config(app, lifespan="off", log_level="error")
        state = uvicorn.server.ServerState()
        self.loop = Loop()
        self.transport = Transport()
        self.protocol = BoundedProtocol(config, state, {}, _loop=self.loop)
        self.protocol.connection_made(self.transport)  # type: ignore[arg-type]
        self.protocol.data_received(REQUEST)

    def finish_answer(self, unsent: int) -> None:
        """Answer the request; so many bytes of the answer are not read yet."""
        headers = [(b"content-length", b"0")]

        async def answer() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": headers}
            await self.protocol.cycle.send(start)
            await self.protocol.cycle.send({"type": "http.response.body"})

        asyncio.run(answer())
        self.transport.unsent = unsent


@pytest.fixture
def connection() -> Connection:
    return Connection()


def test_a_stream_that_is_not_read_is_closed(connection: Connection) -> None:
    connection.transport.unsent = 100_000
    connection.protocol.pause_writing()
    connection.loop.move(SEND_SECONDS - 0.1)
    assert connection.transport.is_open
    connection.loop.move(0.2)
    assert not connection.transport.is_open


def test_a_stream_that_is_read_slowly_stays_open(connection: Connection) -> None:
    connection.transport.unsent = 100_000
    connection.protocol.pause_writing()
    for _ in range(50):
        connection.transport.unsent -= 1000
        connection.loop.move(SEND_SECONDS)
        assert connection.transport.is_open
    connection.protocol.resume_writing()
    connection.loop.move(100 * SEND_SECONDS)
    assert connection.transport.is_open


def test_a_whole_answer_is_not_cut_off_while_it_is_read(connection: Connection) -> None:
    connection.finish_answer(unsent=1_000_000)
    connection.protocol.pause_writing()
    for _ in range(9):
        connection.transport.unsent -= 100_000
        connection.loop.move(SEND_SECONDS)
        assert connection.transport.is_open
    # Once it is read, the client has the usual time for its next request.
    connection.transport.unsent = 0
    connection.protocol.resume_writing()
    connection.loop.move(SEND_SECONDS + HEADER_SECONDS + 0.1)
    assert not connection.transport.is_open


def test_a_whole_answer_that_is_not_read_is_closed(connection: Connection) -> None:
    connection.finish_answer(unsent=3000)  # too little for asyncio to report it
    connection.loop.move(HEADER_SECONDS + 0.1)
    assert connection.transport.is_open
    connection.loop.move(SEND_SECONDS)
    assert not connection.transport.is_open
