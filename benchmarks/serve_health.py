"""Time of ``GET /healthz`` beside heavy requests, against the same on the idle server, in one run.

    python benchmarks/serve_health.py [--rounds 3]

Six clients send bodies of 3.6 MB each, again and again, while one asks for the server's health. Prints the worst and
the median time for each kind of body, and its ratio to the median of the idle server. Server and clients are threads of
one process here, so the times are upper bounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import httpx
import orjson
from serve import random_service, running

BODY_BYTES = 3_600_000
CLIENTS = 6
JSON = {"content-type": "application/json"}


def bodies() -> dict[str, bytes]:
    prompts: dict[str, object] = {
        "a text": "a b, " * (BODY_BYTES // 5),
        "short texts": ["a b"] * (BODY_BYTES // 6),
        "token ids": [1] * (BODY_BYTES // 2),
        "token ids at the limit": [12345] * 131_000,
    }
    return {
        name: orjson.dumps({"model": "model", "prompt": prompt})
        for name, prompt in prompts.items()
    }


def health_times(url: str, count: int) -> list[float]:
    """Return the seconds of some requests for the server's health, one after another."""
    times: list[float] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(count):
            started = time.perf_counter()
            client.get("/healthz")
            times.append(time.perf_counter() - started)
    return times


def times_beside(url: str, body: bytes, count: int) -> list[float]:
    """Return ``health_times`` while the clients send a body again and again."""
    ended = threading.Event()

    def send() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.is_set():
                client.post("/v1/completions", content=body, headers=JSON)

    senders = [threading.Thread(target=send) for _ in range(CLIENTS)]
    for sender in senders:
        sender.start()
    try:
        return health_times(url, count)
    finally:
        ended.set()
        for sender in senders:
            sender.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = random_service(
            hidden=64, layers=1, vocab=32_000, slots=4, folder=Path(folder)
        )
        with running(service) as url:
            for _ in range(options.rounds):
                idle = statistics.median(health_times(url, options.count))
                print(f"idle: median {1000 * idle:.1f} ms")
                for name, body in bodies().items():
                    times = times_beside(url, body, options.count)
                    median = statistics.median(times)
                    print(
                        f"{name}: median {1000 * median:.1f} ms ({median / idle:.0f} times), "
                        f"worst {1000 * max(times):.0f} ms"
                    )


if __name__ == "__main__":
    main()
