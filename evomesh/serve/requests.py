"""Checks of an HTTP request before its body is parsed, its errors, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

T = TypeVar("T")
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
BODY_SECONDS = 30.0  # a client that takes longer to send its body blocks a connection
# Parsing keeps every other thread waiting, so it is bounded by counts that are known
# before: a body of 4 MiB may hold two million token ids, which take 0.2 s. At these
# limits it takes some 10 ms.
MAX_CONTAINERS = 20_000  # lists and objects of a body
MAX_OBJECT_KEYS = 64  # of one object
MAX_KEYS = 2**14  # of all; a new one takes ten times as long as an item
MAX_VALUES = 2**17  # lists and objects, and all items in them
SCAN_BYTES = 2**17  # of a body, that are looked at together
MAX_MESSAGE = 1000  # characters of an error, which may repeat what the client sent
MAX_PARAM = 100
CLIENT_CLOSED_REQUEST = 499  # nobody reads this response; the metrics count it


class ApiError(Exception):
    """An error that the client gets in the format of OpenAI's API.

    Args:
        status: HTTP status.
        message: what is wrong and what would be right.
        code: short and stable, for programs.
        param: the key of the request it is about.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shorten(message, MAX_MESSAGE)
        self.code = code
        self.param = None if param is None else shorten(param, MAX_PARAM)
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the response."""
        error_type = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 401:
            error_type = "authentication_error"
        elif self.status == 429:
            error_type = "rate_limit_error"
        error = {
            "message": self.message,
            "type": error_type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def shorten(text: str, length: int) -> str:
    """Return a text, cut if it is longer than ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the whole body.

    Raises:
        ApiError: 413 too large, 415 not sent as JSON, 408 too slow, 499 the client closed the connection.
    """
    # The page of another site can send anything but this content type without asking
    # the browser first.
    content_type = (
        request.headers.get("content-type", "").partition(";")[0].strip().lower()
    )
    if content_type != "application/json":
        raise ApiError(
            415,
            "the content type is not application/json",
            code="unsupported_media_type",
        )
    too_large = ApiError(
        413, f"the body is larger than {max_bytes} bytes", code="body_too_large"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="timeout"
        ) from None
    except ClientDisconnect:
        raise ApiError(
            CLIENT_CLOSED_REQUEST, "the client closed the connection", code="closed"
        ) from None
    return bytes(body)


@dataclass
class MarkCounts:
    """Counts of what a JSON text holds so far, from the marks outside of its strings."""

    containers: int = 0
    keys: int = 0
    commas: int = 0

    def add(self, marks: np.ndarray) -> None:
        """Count the bytes outside of strings: every object or list has one opening bracket, every key one colon."""
        occurrences = np.bincount(marks, minlength=256).tolist()
        self.containers += occurrences[ord("[")] + occurrences[ord("{")]
        self.keys += occurrences[ord(":")]
        self.commas += occurrences[ord(",")]


def check_structure(body: bytes) -> None:
    """Reject a JSON text that takes long to parse for its size: one of very many values.

    Raises:
        ApiError: 400.
    """
    counts = MarkCounts()
    scanner = StringScanner()
    characters = np.frombuffer(body, np.uint8)
    for start in range(0, len(body), SCAN_BYTES):
        block = characters[start : start + SCAN_BYTES]
        outside = ~scanner.inside(block)
        counts.add(block[outside])
    _check_counts(counts)


def _check_counts(counts: MarkCounts) -> None:
    found = ""
    if counts.containers > MAX_CONTAINERS:
        found = f"{MAX_CONTAINERS} lists and objects"
    elif counts.keys > MAX_KEYS:
        found = f"{MAX_KEYS} keys"
    elif counts.containers + counts.commas > MAX_VALUES:
        found = f"{MAX_VALUES} values, such as token ids"
    if found:
        message = f"the body has more than {found}; send several requests"
        raise ApiError(400, message, code="invalid_json")


class StringScanner:
    """Finds the strings of a JSON text that comes in blocks.

    All of it is numpy on whole blocks, which lets other threads run. A regular
    expression would keep them waiting for as long as the longest string takes.
    """

    def __init__(self) -> None:
        self._is_inside = False  # the last block ended inside a string
        self._is_escaping = False  # and with a backslash that escapes what follows

    def inside(self, block: np.ndarray) -> np.ndarray:
        """Return for each byte of the next block whether it is part of a string, opening quote included."""
        # Every quote turns inside into outside and back: of a"bc"d the quotes are
        # 0 1 0 0 1 0, and their running XOR 0 1 1 1 0 0.
        quotes = block == ord('"')
        quotes[self._escaped(block)] = False
        inside = np.bitwise_xor.accumulate(quotes) ^ self._is_inside
        self._is_inside = bool(inside[-1])
        return inside

    def _escaped(self, block: np.ndarray) -> np.ndarray:
        """Return the positions in the next block that follow a backslash which escapes them."""
        is_backslash = block == ord("\\")
        starts_escaped = self._is_escaping
        if starts_escaped:
            is_backslash[0] = False
        backslashes = np.flatnonzero(is_backslash)
        escaped = _escaping(backslashes) + 1
        # The last one may be the first byte of the next block.
        is_inside = escaped < block.size
        self._is_escaping = not is_inside.all()
        escaped = escaped[is_inside]
        if starts_escaped:
            escaped = np.append(escaped, 0)
        return escaped


def _escaping(backslashes: np.ndarray) -> np.ndarray:
    """Return those of the positions of backslashes that escape what follows."""
    # Of a run of backslashes the first escapes the second, the third the fourth ... The
    # runs 3 4 5 and 9 begin at 3 3 3 and 9: an even distance from there escapes.
    begins_run = np.diff(backslashes, prepend=-2) > 1
    run_begins = np.maximum.accumulate(np.where(begins_run, backslashes, 0))
    is_even = (backslashes - run_begins) % 2 == 0
    return np.compress(is_even, backslashes)


async def run_in(
    threads: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any
) -> T:
    """Return the result of work in one of some threads, while the event loop serves others."""
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


async def wait_until_disconnected(request: Request) -> None:
    """Return once the client has closed the connection; await it only after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class LocalHostMiddleware:
    """Rejects requests for a host name other than this machine's.

    A web page could otherwise point its own host name here, and reach the server
    through the visitor's browser.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_request = scope["type"] in ("http", "websocket")
        if not is_request or is_local(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            400,
            "this server answers to localhost only",
            code="wrong_host",
        )
        response = Response(
            orjson.dumps(error.body()),
            400,
            media_type="application/json",
        )
        await response(scope, receive, send)


def is_local(headers: Headers) -> bool:
    """Return whether a request names this machine as its host."""
    host = headers.get("host", "")
    name = host
    if not host.endswith("]"):  # an IPv6 address without a port
        before_port = host.rpartition(":")[0]
        name = before_port or host
    return name.lower() in LOCAL_NAMES
