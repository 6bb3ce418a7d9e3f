"""The guard of the chat page: lets through gradio's routes that the page uses, with plain values only.

Gradio has many more: uploads, files, proxies, calls of component methods. Here a request for any of them is refused
before gradio sees it, and so is a value that could stand for a file.
"""

from __future__ import annotations

import re
from typing import Any

import orjson
from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evomesh.errors import UserError
from evomesh.serve.requests import ApiError, read_body

READ = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\d+)?|/logout"
    r"|/(assets|static|svelte)/[^\\]+"
    r"|/gradio_api/(user|login_check|token|app_id|info|startup-events)/?|/gradio_api/theme\.css"
    r"|/gradio_api/heartbeat/[^/\\]+|/gradio_api/queue/data"
)
LOGIN = "/login"
ASKS = {"/gradio_api/queue/data"}  # the only path whose query is read
FORM = 4096  # bytes of a login
ROLES = ("user", "assistant")


class Door:
    """Middleware in front of gradio's app."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, method, headers = scope["path"], scope["method"], Headers(scope=scope)
        if method == "POST" and path == LOGIN:
            check_site(headers)
            check_form(headers)
        elif method == "POST" and path in CALLS:
            check_site(headers)
            body = orjson.dumps(CALLS[path](await read_body(Request(scope, receive), self.limit)))
            scope, receive = _with_length(scope, len(body)), _replay(body, receive)
        elif method not in ("GET", "HEAD") or not READ.fullmatch(path) or ".." in path.split("/"):
            raise ApiError(404, "nothing here", code="not_found")
        elif path.startswith("/gradio_api/") or path == "/logout":
            check_site(headers)
        # Gradio lets pages of other sites read answers to requests that name their site.
        kept = [(name, value) for name, value in scope["headers"] if name.lower() != b"origin"]
        query = scope["query_string"] if path in ASKS else b""
        await self.app({**scope, "headers": kept, "query_string": query}, receive, send)


def check_site(headers: Headers) -> None:
    """Refuse what a browser sends for a page of another site.

    Raises:
        ApiError: 403.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        own = site in ("same-origin", "none")
    else:  # a browser tells the first only to https and localhost
        own = origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
    if not own:
        raise ApiError(403, "requests from pages of other sites are refused", code="other_site")


def check_form(headers: Headers) -> None:
    length = headers.get("content-length", "")
    if not length.isdecimal() or int(length[:20]) > FORM:
        raise ApiError(413, f"the form is larger than {FORM} bytes", code="body_too_large")


def call_of(body: bytes) -> dict[str, Any]:
    """Read a call of one of the page's functions and keep only what gradio needs of it.

    Raises:
        ApiError: 400: a value is neither text, a number, nor a conversation of text.
    """
    asked = _record(body)
    values = asked.get("data")
    if not isinstance(values, list):
        raise _bad("data")
    found = {
        "data": [_value(value) for value in values],
        "fn_index": _of(asked, "fn_index", int),
        "session_hash": _of(asked, "session_hash", str),
    }
    return found if asked.get("trigger_id") is None else found | {"trigger_id": _of(asked, "trigger_id", int)}


def cancel_of(body: bytes) -> dict[str, Any]:
    asked = _record(body)
    return {
        name: _of(asked, name, kind)
        for name, kind in (("session_hash", str), ("fn_index", int), ("event_id", str))
    }


def text_of(turn: Any) -> str:
    """Return the text of a turn, which is given as text or as a list of text parts.

    Raises:
        UserError: it is not a turn, or it holds more than text.
    """
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise UserError("a turn of the conversation is of no known kind")
    content = turn.get("content")
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part != {"type": "text", "text": text}:
            raise UserError("a turn of the conversation holds more than text")
        texts.append(text)
    return "".join(texts)


def _value(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if not isinstance(value, list):
        raise _bad("data")
    try:
        return [
            {"content": [{"type": "text", "text": text_of(turn)}], "role": turn["role"]} for turn in value
        ]
    except UserError as error:
        raise ApiError(400, str(error), param="data", code="invalid_value") from None


def _record(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_value")
    return found


def _of(record: dict[str, Any], name: str, kind: type) -> Any:
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _bad(name)
    return value


def _bad(name: str) -> ApiError:
    return ApiError(400, f"{name}: not of the kind that the page sends", param=name, code="invalid_value")


CALLS = {
    "/gradio_api/queue/join": call_of,
    "/gradio_api/run/predict": call_of,  # functions that do not queue
    "/gradio_api/cancel": cancel_of,
}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a channel that gives the body once, then what comes after it."""
    given = False

    async def one() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return one


def _with_length(scope: Scope, length: int) -> Scope:
    drop = (b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in drop]
    return {**scope, "headers": [*kept, (b"content-length", str(length).encode())]}
