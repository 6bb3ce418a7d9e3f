"""POST JSON with a deadline; no error of it repeats the URL, which is a secret."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

TIMEOUT_S = 5.0  # to connect, and for each part of the answer
ANSWER_S = 10.0  # for the whole answer
LARGEST_ANSWER = 64 * 1024  # bytes; what comes after is not read
_TOO_MANY_REQUESTS = 429


class DeliveryError(Exception):
    """A message did not arrive.

    Args:
        reason: in words, without addresses and secrets.
        is_final: the same message would be refused again.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Handler that reports a redirect as an error: urllib would repeat it as a GET, without the message."""

    def redirect_request(self, *request: Any, **facts: Any) -> None:
        return None


def post_json(url: str, document: Any, timeout: float = TIMEOUT_S) -> bytes:
    """Send a document and return the answer's body, at most ``LARGEST_ANSWER`` bytes.

    Proxies are those of the environment.

    Raises:
        DeliveryError: no answer, or one that is not a success.
    """
    request = urllib.request.Request(
        url,
        data=json.dumps(document, ensure_ascii=False).encode("utf-8", "replace"),
        headers={"Content-Type": "application/json; charset=utf-8"},
        method="POST",
    )
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(request, timeout=timeout) as response:
            return _read_answer(response)
    except urllib.error.HTTPError as error:
        error.close()
        # Another try changes nothing where the request itself is refused.
        is_final = 300 <= error.code < 500 and error.code != _TOO_MANY_REQUESTS
        raise DeliveryError(
            f"the server answered {error.code}", is_final=is_final
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DeliveryError(failure_words(error)) from None


def _read_answer(response: http.client.HTTPResponse) -> bytes:
    deadline = time.monotonic() + ANSWER_S
    answer = b""
    while len(answer) < LARGEST_ANSWER:
        part = response.read1(LARGEST_ANSWER - len(answer))
        if not part:
            break
        answer += part
        if time.monotonic() > deadline:
            raise TimeoutError
    return answer


def failure_words(error: Exception) -> str:
    """Return why a connection failed, in words of which none is an address."""
    cause: object = error
    if isinstance(error, urllib.error.URLError):
        cause = error.reason
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, http.client.RemoteDisconnected):
        return "the server closed the connection without an answer"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    if isinstance(cause, http.client.HTTPException):
        return "the answer is not HTTP"
    return type(cause).__name__
