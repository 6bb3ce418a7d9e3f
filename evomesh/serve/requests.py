"""From an HTTP request to a checked body."""

from __future__ import annotations

import asyncio
import secrets

import orjson
from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from evomesh.serve.errors import ApiError

LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
BODY_SECONDS = 30.0  # a client that takes longer to send its body holds a connection for nothing


def check_key(request: Request, key: str | None) -> None:
    """Raises: ApiError 401: a key is set and the request does not bear it."""
    if key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Compared as bytes: compare_digest refuses text that is not ASCII.
    if kind.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
        message = "wrong key" if given else "no key; send it as: Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 too large, 415 not sent as JSON, 408 too slow.
    """
    # A page of another site can send anything but this content type without asking first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type is not application/json", code="unsupported_media_type")
    large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s", code="timeout") from None
    return bytes(body)


async def gone(request: Request) -> None:
    """Returns when the client has closed the connection; to be awaited after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class LocalHostMiddleware:
    """Refuses requests for a host that is not this machine: a web page may have its own name point here."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = Headers(scope=scope).get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in LOCAL_NAMES:
                error = ApiError(400, "this server answers to localhost only", code="wrong_host")
                await Response(orjson.dumps(error.body()), 400, media_type="application/json")(
                    scope, receive, send
                )
                return
        await self.app(scope, receive, send)
