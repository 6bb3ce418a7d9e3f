"""The guard of the chat page: only the gradio routes that the page uses, with plain values only.

Gradio has many more routes: uploads, files, proxies, calls of component methods. A
request for any of them is rejected before gradio sees it, and so is a value that could
refer to a file.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
from fastapi import Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evomesh.errors import UserError
from evomesh.serve.key_gate import KeyGate, client_name
from evomesh.serve.requests import ApiError, check_structure, read_body, run_in

READABLE_PATH = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\d+)?|/logout"
    r"|/(assets|static|svelte)/[^\\]+"
    r"|/gradio_api/(user|login_check|token|app_id|info|startup-events)/?|/gradio_api/theme\.css"
    r"|/gradio_api/heartbeat/[^/\\]+|/gradio_api/queue/data"
)
LOGIN_PATH = "/login"
LOGGED_IN = 200  # gradio's status for a right key
PATHS_WITH_QUERY = {"/gradio_api/queue/data"}  # all other paths lose their query string
STREAM_PATH = re.compile(r"/gradio_api/(heartbeat/.*|queue/data)")
MAX_STREAMS = 512  # an open page has one or two
MAX_CLIENT_STREAMS = 128
MAX_NAME = 64  # characters of what a browser calls its session and its calls
MAX_FORM_BYTES = 4096  # of the login form
# Gradio's page has scripts and styles in the document itself, and its templates are
# compiled in the browser.
CONTENT_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    b"frame-src 'self'; worker-src 'self' blob:; object-src 'none'; form-action 'self'; base-uri 'self'; "
    b"frame-ancestors 'self'"
)
ROLES = ("user", "assistant")


class GradioGuard:
    """Middleware in front of gradio's app.

    Args:
        max_body_bytes: maximum size of a call.
        parser: the thread that parses bodies, one at a time.
        gate: limits the wrong keys of the login; None: no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        parser: ThreadPoolExecutor,
        gate: KeyGate | None,
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.parser = parser
        self.gate = gate
        self.streams = OpenStreams()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to gradio if it is one that the page makes.

        Raises:
            ApiError: it is not.
        """
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Every request is one of three kinds: a login, a call, or the reading of a path.
        path = scope["path"]
        is_post = scope["method"] == "POST"
        if is_post and path == LOGIN_PATH:
            send = self._check_login(scope, send)
        elif is_post and path in CALL_PARSERS:
            scope, receive = await self._check_call(scope, receive)
        else:
            _check_reading(scope)
        with self.streams.entered(scope):
            response = PageResponse(send)
            await self._forward(scope, receive, response)

    def _check_login(self, scope: Scope, send: Send) -> Send:
        """Check a login, and return the channel for its answer, which counts wrong keys."""
        headers = Headers(scope=scope)
        check_same_site(headers)
        check_form_size(headers)
        return send if self.gate is None else _with_limit(self.gate, scope, send)

    async def _check_call(
        self, scope: Scope, receive: Receive
    ) -> tuple[Scope, Receive]:
        """Check a call of one of the page's functions, and return what gradio gets in its place."""
        headers = Headers(scope=scope)
        check_same_site(headers)
        request = Request(scope, receive)
        received = await read_body(request, self.max_body_bytes)
        # Gradio gets a new body, which holds nothing but what was checked.
        path = scope["path"]
        body = await run_in(self.parser, _checked_call, path, received)
        checked_scope = _with_content_length(scope, len(body))
        return checked_scope, _replay(body, receive)

    async def _forward(
        self, scope: Scope, receive: Receive, response: PageResponse
    ) -> None:
        """Let gradio answer a checked request."""
        try:
            await self.app(_without_origin_and_query(scope), receive, response.send)
        except Exception as error:
            if not response.is_started or not _is_http_error(error):
                raise
            # Gradio has sent the error as the last event of a stream.
            await response.send({"type": "http.response.body", "body": b""})


def _check_reading(scope: Scope) -> None:
    """Check a request that changes nothing.

    Raises:
        ApiError: 404: the page reads no such path; 403: it is sent for another site's page.
    """
    path = scope["path"]
    if scope["method"] not in ("GET", "HEAD") or not is_readable(path):
        raise ApiError(404, "the page has no such route", code="not_found")
    # A link on another site may lead to the page itself.
    if path.startswith("/gradio_api/") or path == "/logout":
        check_same_site(Headers(scope=scope))


def is_readable(path: str) -> bool:
    """Return whether the page reads this path."""
    return READABLE_PATH.fullmatch(path) is not None and ".." not in path.split("/")


def check_same_site(headers: Headers) -> None:
    """Reject a request that a browser sends on behalf of another site's page.

    Raises:
        ApiError: 403.
    """
    fetch_site = headers.get("sec-fetch-site")
    origin = headers.get("origin")
    if fetch_site is not None:
        same_site = fetch_site in ("same-origin", "none")
    # Browsers send the other header to https and localhost only.
    elif origin is not None:
        origin_host = origin.partition("://")[2]
        own_host = headers.get("host", "")
        same_site = origin_host.lower() == own_host.lower()
    else:
        same_site = True
    if not same_site:
        raise ApiError(
            403, "requests from pages of other sites are rejected", code="other_site"
        )


def check_form_size(headers: Headers) -> None:
    """Reject a form that is too large or of unknown size.

    Raises:
        ApiError: 413.
    """
    length = headers.get("content-length", "")
    if not length.isdecimal() or int(length[:20]) > MAX_FORM_BYTES:
        raise ApiError(
            413,
            f"the form is larger than {MAX_FORM_BYTES} bytes",
            code="body_too_large",
        )


def parse_call(body: bytes) -> dict[str, Any]:
    """Read a call of one of the page's functions, and keep only what gradio needs.

    Raises:
        ApiError: 400: a value is neither text, a number, nor a conversation of text.
    """
    call = _parse_object(body)
    values = call.get("data")
    if not isinstance(values, list):
        raise _invalid_value("data")
    checked: dict[str, Any] = {
        "data": [_check_value(value) for value in values],
        "fn_index": _get_typed(call, "fn_index", int),
        "session_hash": _get_name(call, "session_hash"),
    }
    if call.get("trigger_id") is not None:
        checked["trigger_id"] = _get_typed(call, "trigger_id", int)
    return checked


def parse_cancellation(body: bytes) -> dict[str, Any]:
    """Read a request to end a call, and keep only what gradio needs.

    Raises:
        ApiError: 400.
    """
    cancellation = _parse_object(body)
    return {
        "session_hash": _get_name(cancellation, "session_hash"),
        "fn_index": _get_typed(cancellation, "fn_index", int),
        "event_id": _get_name(cancellation, "event_id"),
    }


CALL_PARSERS = {
    "/gradio_api/queue/join": parse_call,
    "/gradio_api/run/predict": parse_call,  # functions that do not queue
    "/gradio_api/cancel": parse_cancellation,
}


def _checked_call(path: str, received: bytes) -> bytes:
    return orjson.dumps(CALL_PARSERS[path](received))


def page_error(found: str, fix: str = "") -> UserError:
    """Return what the page shows for a request that cannot be answered."""
    return UserError(found, fix=fix, code="EVO-SERVE-003")


def message_text(message: Any) -> str:
    """Return the text of a message, whose content is a string or a list of text parts.

    Raises:
        UserError: it is not a message, or it contains more than text.
    """
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise page_error("a message of the conversation has an unknown format")
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        content = [content]
    texts = map(_part_text, content)
    return "".join(texts)


def _part_text(part: Any) -> str:
    """Return the text of {"type": "text", "text": "..."}; any further key could make gradio take it for a file."""
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str) or part != {"type": "text", "text": text}:
        raise page_error("a message of the conversation contains more than text")
    return text


def _check_value(value: Any) -> Any:
    """Return a value of a call; a list must be a conversation, which is rebuilt from its texts."""
    if value is None or isinstance(value, str | int | float):
        return value
    if not isinstance(value, list):
        raise _invalid_value("data")
    conversation = []
    for message in value:
        try:
            text = message_text(message)
        except UserError as error:
            raise ApiError(
                400, str(error), param="data", code="invalid_value"
            ) from None
        content = [{"type": "text", "text": text}]
        conversation.append({"content": content, "role": message["role"]})
    return conversation


def _parse_object(body: bytes) -> dict[str, Any]:
    check_structure(body)
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(parsed, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_value")
    return parsed


def _get_typed(record: dict[str, Any], name: str, expected: type) -> Any:
    value = record.get(name)
    if not isinstance(value, expected) or isinstance(value, bool):
        raise _invalid_value(name)
    return value


def _get_name(record: dict[str, Any], key: str) -> str:
    """Return a short text; gradio and the page keep it."""
    name: str = _get_typed(record, key, str)
    if len(name) > MAX_NAME:
        raise _invalid_value(key)
    return name


def _invalid_value(name: str) -> ApiError:
    return ApiError(
        400,
        f"{name}: not a value that the page sends",
        param=name,
        code="invalid_value",
    )


def _without_origin_and_query(scope: Scope) -> Scope:
    # Gradio lets pages of other sites read its answers to requests that name their
    # site.
    headers = [
        (name, value) for name, value in scope["headers"] if name.lower() != b"origin"
    ]
    query = scope["query_string"] if scope["path"] in PATHS_WITH_QUERY else b""
    return {**scope, "headers": headers, "query_string": query}


class PageResponse:
    """The response to a request of the page, as far as it was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = False

    async def send(self, message: Message) -> None:
        """Send a part; the first tells browsers to load nothing from other servers, such as images in an answer."""
        if message["type"] == "http.response.start":
            self.is_started = True
            header = (b"content-security-policy", CONTENT_POLICY)
            message = {**message, "headers": [*message.get("headers", []), header]}
        await self._send(message)


class OpenStreams:
    """Counts the streams of open pages, which stay open for as long as their pages and would keep others out."""

    def __init__(self) -> None:
        self._count_by_client: Counter[str] = Counter()

    @contextlib.contextmanager
    def entered(self, scope: Scope) -> Iterator[None]:
        """Count a request while it is answered, if it opens a stream.

        Raises:
            ApiError: 429: there are too many.
        """
        if STREAM_PATH.fullmatch(scope["path"]) is None:
            yield
            return
        client = client_name(scope)
        counts = self._count_by_client
        if counts.total() >= MAX_STREAMS or counts[client] >= MAX_CLIENT_STREAMS:
            raise ApiError(429, "too many open pages", code="too_many_streams")
        counts[client] += 1
        try:
            yield
        finally:
            counts[client] -= 1
            if not counts[client]:
                del counts[client]


def _is_http_error(error: Exception) -> bool:
    """Return whether an exception is a status for the client, or stands for one that came too late."""
    return isinstance(error, HTTPException) or isinstance(
        error.__cause__, HTTPException
    )


def _with_limit(gate: KeyGate, scope: Scope, send: Send) -> Send:
    """Take a try for a login, and return a channel that puts it back if gradio accepts the key.

    Raises:
        ApiError: 429: there is no try left.
    """
    client = gate.take_try(scope)

    async def send_and_count(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == LOGGED_IN:
            gate.accept(client)
        await send(message)

    return send_and_count


def _with_content_length(scope: Scope, length: int) -> Scope:
    replaced = (b"content-length", b"transfer-encoding")
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name.lower() not in replaced
    ]
    headers.append((b"content-length", str(length).encode()))
    return {**scope, "headers": headers}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a channel that delivers the body once, then whatever ``receive`` does."""
    delivered = False

    async def receive_body_first() -> Message:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body_first
