"""``evomesh watch``: the page of a run, served while it trains.

``/`` is the page; ``/events`` sends its figures again whenever a file of the run folder has
changed, as server-sent events. Both only read, and take nothing from the client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, StreamingResponse

from evomesh.errors import UserError
from evomesh.monitor.alerts.files import ALERTS_FILE
from evomesh.monitor.history import HISTORY_FILE
from evomesh.monitor.overview import METRICS_FILE
from evomesh.monitor.status import FOLDER
from evomesh.runs.page import embedded_json, render_page
from evomesh.runs.payload import payload_of
from evomesh.runs.read import read_run
from evomesh.serve.requests import LocalHostMiddleware

POLL_S = 1.0  # between two looks at the files
REST_SHARE = 10  # a look that took one second is followed by ten without
KEEP_ALIVE_S = 15.0  # a line without content tells a gone client from a quiet one
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Version = tuple[tuple[int, int], ...]


class RunWatch:
    """The newest figures of some runs, for any number of readers.

    Args:
        folders: of the runs.
        poll_s: seconds between two looks at their files.
    """

    def __init__(self, folders: Sequence[Path], poll_s: float = POLL_S) -> None:
        self.folders = list(folders)
        self.poll_s = poll_s
        self.has_ended = False
        self._lock = asyncio.Lock()
        self._version: Version | None = None
        self._message = ""
        self._rest_until = 0.0

    def end(self) -> None:
        """End all streams; the server calls it when it stops."""
        self.has_ended = True

    def page(self) -> str:
        """Return the page with the figures of now.

        Raises:
            UserError: a file cannot be read.
        """
        runs = [read_run(folder) for folder in self.folders]
        return render_page(payload_of(runs, time.time(), live=True))

    async def messages(self) -> AsyncIterator[str]:
        """Yield an event for each change of the files, until the server ends or the client is gone."""
        sent: str | None = None
        quiet_since = time.monotonic()
        while not self.has_ended:
            message = await self._newest()
            if message != sent:
                yield f"data: {message}\n\n"
                sent = message
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > KEEP_ALIVE_S:
                yield ": quiet\n\n"
                quiet_since = time.monotonic()
            await asyncio.sleep(self.poll_s)

    async def _newest(self) -> str:
        """Return the figures as JSON; read again only if a file has changed, by one reader for all."""
        async with self._lock:
            version = self._version_of_files()
            is_resting = time.monotonic() < self._rest_until
            if version == self._version or (is_resting and self._message):
                return self._message
            began = time.monotonic()
            with suppress(UserError):  # a file is being replaced: at the next look
                self._message = await asyncio.to_thread(self._read)
                self._version = version
            ended = time.monotonic()
            self._rest_until = ended + REST_SHARE * (ended - began)
            return self._message

    def _read(self) -> str:
        runs = [read_run(folder) for folder in self.folders]
        return embedded_json(payload_of(runs, time.time(), live=True))

    def _version_of_files(self) -> Version:
        marks = []
        for folder in self.folders:
            names = (METRICS_FILE, HISTORY_FILE, ALERTS_FILE)
            paths = [folder / name for name in names]
            for path in paths + _ended_ranks(folder):
                with suppress(OSError):
                    status = path.stat()
                    marks.append((status.st_mtime_ns, status.st_size))
        return tuple(marks)


def _ended_ranks(folder: Path) -> list[Path]:
    """Return the status files that nobody writes any more: a run that trains rewrites them every second."""
    files = []
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        with suppress(OSError):
            is_quiet = time.time() - path.stat().st_mtime > 2.0
            if is_quiet:
                files.append(path)
    return files


def create_watch_app(watch: RunWatch, *, local: bool) -> FastAPI:
    """Create the app.

    Args:
        local: it listens on this machine only, so it answers no request for another host's name.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if local:
        app.add_middleware(LocalHostMiddleware)

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(watch.page(), headers=HEADERS)

    @app.get("/events")
    def events() -> StreamingResponse:
        stream = watch.messages()
        return StreamingResponse(
            stream, media_type="text/event-stream", headers=HEADERS
        )

    return app
