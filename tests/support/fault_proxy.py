"""An HTTP proxy before an object store that answers some requests wrongly, by a script.

with FaultProxy("127.0.0.1:5000", lambda number, method, path: "503" if number % 3 == 0 else None) as address: ...
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (number of the request, method, path) -> fault.
Script = Callable[[int, str, str], str | None]
FAULTS = ("500", "503", "slowdown", "reset", "reset after", "truncate", "hang")


class FaultProxy(ThreadingHTTPServer):
    """Beside ``FAULTS``, which a client gets over, a script may answer "denied" or "flip".

    Args:
        hang: seconds after which a hanging request is dropped.
    """

    daemon_threads = True

    def __init__(self, target: str, script: Script, hang: float = 3.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.script, self.hang = target, script, hang
        self.count = 0
        self.faults: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> Any:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        self.address = f"127.0.0.1:{self.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def next_fault(self, method: str, path: str) -> str | None:
        with self.lock:
            self.count += 1
            fault = self.script(self.count, method, path)
            if fault:
                self.faults.append(fault)
        return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # clients that give up are part of the game


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def _serve(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Expect", "").lower() == "100-continue":
            pass  # BaseHTTPRequestHandler has answered it already
        body = self.rfile.read(size)
        fault = self.server.next_fault(self.command, self.path)
        if fault in ("500", "503", "slowdown"):
            code = "SlowDown" if fault == "slowdown" else "InternalError"
            self._answer(
                500 if fault == "500" else 503,
                {},
                f"<Error><Code>{code}</Code></Error>".encode(),
            )
            return
        if fault == "denied":
            self._answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if fault == "reset":
            self._reset()
            return
        if fault == "hang":
            time.sleep(self.server.hang)
            self._reset()
            return
        upstream = http.client.HTTPConnection(self.server.target, timeout=30)
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() != "expect"
        }
        upstream.request(self.command, self.path, body=body, headers=headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault == "reset after":  # done, and the answer is lost
            self._reset()
            return
        own = ("transfer-encoding", "connection", "content-length")
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in own
        }
        if self.command == "HEAD":
            kept["Content-Length"] = answer.getheader("Content-Length") or "0"
        if fault == "flip" and data:  # one bit of the content
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._answer(answer.status, kept, data, cut=fault == "truncate")

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.close_connection = True
        self.connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def log_message(self, format: str, *args: object) -> None:
        return
