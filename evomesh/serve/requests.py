"""Checks of an HTTP request before its body is parsed, its errors, and its end."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
BODY_SECONDS = 30.0  # a client that takes longer to send its body blocks a connection


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
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, other)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def check_key(request: Request, key: str | None) -> None:
    """Refuse a request without the server's key, if it has one.

    Raises:
        ApiError: 401.
    """
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Compared as bytes: compare_digest rejects text that is not ASCII.
    if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
        message = "wrong key" if given else "no key; send it as: Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the whole body.

    Raises:
        ApiError: 413 too large, 415 not sent as JSON, 408 too slow.
    """
    # The page of another site can send anything but this content type without asking the browser first.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "the content type is not application/json", code="unsupported_media_type")
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
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
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="timeout") from None
    return bytes(body)


async def wait_until_disconnected(request: Request) -> None:
    """Return once the client has closed the connection; await it only after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class LocalHostMiddleware:
    """Refuses requests for a host name other than this machine's.

    A web page could otherwise point its own host name here, and reach the server through the visitor's browser.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = Headers(scope=scope).get("host", "")
            # Without the port; an IPv6 address ends with a bracket.
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in LOCAL_NAMES:
                error = ApiError(400, "this server answers to localhost only", code="wrong_host")
                response = Response(orjson.dumps(error.body()), 400, media_type="application/json")
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)
