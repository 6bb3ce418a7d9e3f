"""An S3 store in this process, with one bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moto.server import ThreadedMotoServer

from evomesh.storage import s3

KEYS = {"ACCESS_KEY": "k", "SECRET_ACCESS_KEY": "s"}


@contextmanager
def moto_store(bucket: str) -> Iterator[str]:
    """Run a server with an empty bucket; yields HOST:PORT."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3.make_client(f"http://{host}:{port}", KEYS).create_bucket(Bucket=bucket)
        yield f"{host}:{port}"
    finally:
        server.stop()
