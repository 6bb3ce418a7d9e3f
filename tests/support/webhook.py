"""A local HTTP server that takes webhooks, and behaves as badly as it is asked to; a local mail server."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from tests.support.local_http import LocalHttpServer

OK = b'{"code": 0, "errcode": 0}'


class WebhookServer(LocalHttpServer):
    """Context manager: a server on a free port of this machine, and what it received.

    Attributes:
        received: (path, JSON document) of each message, in order.
        answers: (status, body) of the next messages; when they have run out, ``answer`` is given.
        answer: (status, body); None: close the connection without an answer.
        gate: an answer waits until it is set, as it is at the start.
    """

    def __init__(self, answer: tuple[int, bytes] | None = (200, OK)) -> None:
        self.received: list[tuple[str, Any]] = []
        self.answers: list[tuple[int, bytes] | None] = []
        self.answer = answer
        self.location = ""
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer._take(self)

            do_GET = do_POST

            def log_message(self, *words: object) -> None:
                pass

        super().__init__(Handler)

    @property
    def documents(self) -> list[Any]:
        return [document for _, document in self.received]

    def _take(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        self.received.append((request.path, json.loads(body) if body else None))
        self.arrived.release()
        answer = self.answers.pop(0) if self.answers else self.answer
        self.gate.wait(60)
        if answer is None:
            request.close_connection = True
            return
        status, text = answer
        request.send_response(status)
        if self.location:
            request.send_header("Location", self.location)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.gate.set()
        super().__exit__(kind, error, trace)


class MailServer:
    """Context manager: an SMTP server for one connection at a time, without encryption.

    Attributes:
        mails: text of each mail.
        commands: every line of a client but those of mails.
        replies: reply to a command by its first word, where it is not the usual one.
    """

    def __init__(self, replies: dict[str, str] | None = None) -> None:
        self.mails: list[str] = []
        self.commands: list[str] = []
        self.replies = replies or {}
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as stream:
                self._converse(stream)

    def _converse(self, stream: Any) -> None:
        def reply(text: str) -> None:
            stream.write(f"{text}\r\n".encode())
            stream.flush()

        reply(self.replies.get("", "220 ready"))
        while line := stream.readline().decode().strip():
            self.commands.append(line)
            word = line.partition(" ")[0].upper()
            usual = {"DATA": "354 begin", "QUIT": "221 bye"}.get(word, "250 fine")
            reply(self.replies.get(word, usual))
            if word == "QUIT":
                return
            if word == "DATA":
                lines = iter(stream.readline, b".\r\n")
                self.mails.append(b"".join(lines).decode())
                reply("250 taken")

    def __enter__(self) -> MailServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
