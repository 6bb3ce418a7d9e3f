"""Messages between the watchers of a job: one JSON object a line, over one connection for each host.

Each host's watcher sends its reports to the watcher of rank 0's host and receives its
requests. The connection belongs to no rank, so it works while any of them hangs.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import select
import selectors
import socket
from typing import Any

Message = dict[str, Any]
MAX_LINE = 64 * 2**20
MAX_FIRST_LINE = 4096  # of somebody who has not shown the token
CONNECT_S = 10.0


class Link:
    """One end of a connection, which never blocks for long.

    Attributes:
        host: who is at the other end, once its first message has been accepted.
        is_closed: the other end has gone.
        max_line: bytes of a message; a longer one closes the connection.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(CONNECT_S)
        self.host = ""
        self.is_closed = False
        self.max_line = MAX_LINE
        self._socket = connection
        self._received = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send a message; a connection that takes none is closed."""
        line = json.dumps(message).encode() + b"\n"
        try:
            self._socket.sendall(line)
        except OSError:
            self.close()

    def has_arrived(self) -> bool:
        """Return whether there is something to read."""
        if self.is_closed:
            return False
        poll = select.poll()  # unlike select.select, for any number of a descriptor
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def receive(self) -> list[Message]:
        """Return the messages that have arrived; call it when there is something to read."""
        try:
            data = self._socket.recv(2**20)
        except OSError:
            data = b""
        self._received += data
        if not data or len(self._received) > self.max_line:
            self.close()
            return []
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self.close()
                return []
            messages.append(message)
        return messages

    def close(self) -> None:
        self.is_closed = True
        self._socket.close()


class LinkServer:
    """The watcher of rank 0's host: listens at a free port and keeps the links of the other hosts.

    Args:
        token: what a host must send first, so that nobody else can end the job.
    """

    def __init__(self, token: str) -> None:
        self._token = token
        family = socket.AF_INET
        if socket.has_dualstack_ipv6():
            family = socket.AF_INET6
        self._listener = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def links(self) -> list[Link]:
        """Return the hosts that are connected."""
        keys = self._selector.get_map().values()
        links = [key.fileobj for key in keys if isinstance(key.fileobj, Link)]
        return [link for link in links if link.host]

    def receive(self) -> list[tuple[str, Message]]:
        """Return the messages that have arrived since the last call, each with its host."""
        messages = []
        while ready := self._selector.select(0):
            for key, _ in ready:
                if isinstance(key.fileobj, Link):
                    messages += self._read(key.fileobj)
                else:
                    self._accept()
        return messages

    def send(self, message: Message) -> None:
        """Send a message to every host."""
        for link in self.links:
            link.send(message)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            link = Link(connection)
            link.max_line = MAX_FIRST_LINE
            self._selector.register(link, selectors.EVENT_READ)

    def _read(self, link: Link) -> list[tuple[str, Message]]:
        descriptor = link.fileno()
        messages = link.receive()
        if not link.host and messages:
            greeting = messages.pop(0)
            self._greet(link, greeting)
        if link.is_closed:
            self._selector.unregister(descriptor)
            return []
        return [(link.host, message) for message in messages]

    def _greet(self, link: Link, greeting: Message) -> None:
        """Take the host's name from its first message, or close the link where the token is not ours."""
        token = str(greeting.get("token", ""))
        shown = token.encode()
        expected = self._token.encode()
        is_ours = hmac.compare_digest(shown, expected)
        if not is_ours:
            link.close()
            return
        host = str(greeting.get("host", ""))
        link.host = host or "?"
        link.max_line = MAX_LINE


def connect(address: tuple[str, int], token: str, host: str) -> Link:
    """Connect a host's watcher to that of rank 0's host.

    Raises:
        OSError: it cannot be reached.
    """
    link = Link(socket.create_connection(address, CONNECT_S))
    link.send({"token": token, "host": host})
    return link
