"""Time of ``GET /healthz`` beside heavy requests, against the same on the idle server, in one run.

    python benchmarks/serve_health.py [--rounds 3] [--count 100] [--clients 6]

Six clients send bodies of 3.6 MB each, or texts of 8 MB, again and again, to the API or
to the chat page, while one asks for the server's health. Prints the worst and the
median time for each kind of body, and its ratio to the median of the idle server. The
server is a process, and so is each client: they compete for cores, but for no
interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import orjson
from serve import random_service

from evomesh.serve.app import create_app
from evomesh.serve.http_server import bind, create_server
from evomesh.serve.page import mount_page

BODY_BYTES = 3_600_000
JSON = {"content-type": "application/json"}
COMPLETIONS = "/v1/completions"
PAGE_CALL = "/gradio_api/queue/join"


@dataclass(frozen=True)
class HeavyRequest:
    """A request that takes long to read, or to refuse."""

    name: str
    path: str
    body: bytes


def heavy_requests() -> list[HeavyRequest]:
    """Return one request of each kind."""
    long_text = "a b, " * (BODY_BYTES // 5)
    prompts: dict[str, object] = {
        "a text": long_text,
        "a text of 8 MB": "a b, " * 1_600_000,
        "short texts": ["a b"] * (BODY_BYTES // 6),
        "texts with commas": ["a, b, c, [d]"] * (BODY_BYTES // 15),
        "token ids": [1] * (BODY_BYTES // 2),
        "token ids at the limit": [12345] * 131_000,
        "lists at the limit": [[1, 2, 3]] * 19_900,
    }
    requests: list[HeavyRequest] = []
    for name, prompt in prompts.items():
        body = orjson.dumps({"model": "model", "prompt": prompt})
        requests.append(HeavyRequest(name, COMPLETIONS, body))
    keys = {f"key{number}": 1 for number in range(16_000)}
    body = orjson.dumps({"model": "model", "prompt": "a", "metadata": keys})
    requests.append(HeavyRequest("keys at the limit", COMPLETIONS, body))

    # Function 0 of the page completes a text.
    completion = {"data": [long_text, "", *[1] * 8], "fn_index": 0, "session_hash": "a"}
    body = orjson.dumps(completion)
    requests.append(HeavyRequest("page: a text", PAGE_CALL, body))
    return requests


def run_server(port: Connection) -> None:
    """Serve a small random model until the process is ended, and send the port."""
    with tempfile.TemporaryDirectory() as folder:
        service = random_service(
            hidden=64, layers=1, vocab=32_000, slots=4, folder=Path(folder)
        )
        app = create_app(service)
        mount_page(app, service, None)
        listening = bind("127.0.0.1", 0)
        port.send(listening.getsockname()[1])
        create_server(app, service.engines.end_answers).run(sockets=[listening])


def send_again_and_again(url: str, request: HeavyRequest, ended: Event) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        while not ended.is_set():
            # An upload that is refused unread may be reset.
            with contextlib.suppress(httpx.TransportError):
                client.post(request.path, content=request.body, headers=JSON)


def health_times(url: str, count: int) -> list[float]:
    """Return the seconds of some requests for the server's health, one after another."""
    times: list[float] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        client.get("/healthz")
        for _ in range(count):
            started = time.perf_counter()
            client.get("/healthz")
            times.append(time.perf_counter() - started)
            time.sleep(0.01)
    return times


@contextlib.contextmanager
def sending(url: str, request: HeavyRequest, clients: int) -> Iterator[None]:
    """Send a request from several processes, again and again, until the block ends."""
    ended = multiprocessing.Event()
    senders = [
        multiprocessing.Process(
            target=send_again_and_again, args=(url, request, ended), daemon=True
        )
        for _ in range(clients)
    ]
    for sender in senders:
        sender.start()
    try:
        yield
    finally:
        ended.set()
        for sender in senders:
            sender.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--only", help="a part of the names of the requests to send")
    options = parser.parse_args()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=run_server, args=(theirs,), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    requests = [
        request for request in heavy_requests() if (options.only or "") in request.name
    ]
    for _ in range(options.rounds):
        idle = statistics.median(health_times(url, options.count))
        print(f"idle: median {1000 * idle:.1f} ms")
        for request in requests:
            with sending(url, request, options.clients):
                times = health_times(url, options.count)
            median = statistics.median(times)
            print(
                f"{request.name}: median {1000 * median:.1f} ms ({median / idle:.0f} times), "
                f"worst {1000 * max(times):.0f} ms",
                flush=True,
            )
    server.terminate()


if __name__ == "__main__":
    main()
