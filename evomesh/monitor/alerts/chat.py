"""Channels of chat services, and a generic webhook: each a URL that takes an alert as JSON."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote_plus

from evomesh.monitor.alerts.alert import Alert
from evomesh.monitor.alerts.http import DeliveryError, post_json

# Bytes of a text message that a service takes, with room for what JSON adds.
FEISHU_BYTES = 18_000
DINGTALK_BYTES = 18_000
WECOM_BYTES = 2_000
SLACK_BYTES = 30_000


def shortened(text: str, limit: int) -> str:
    """Return text whose UTF-8 has at most ``limit`` bytes; one that is too long ends in ``...``."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return text
    return encoded[: limit - 3].decode("utf-8", "ignore") + "..."


def plain_message(alert: Alert, limit: int) -> str:
    """Return title and body of an alert as one text."""
    return shortened(f"{alert.title}\n{alert.body}", limit)


class WebhookChannel:
    """A URL that takes the alert's fields as one JSON object; any answer 2xx is a success."""

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, alert: Alert) -> None:
        post_json(
            self._url,
            {
                "job": alert.job,
                "kind": alert.kind,
                "text": alert.text,
                "host": alert.host,
                "time": alert.time,
                "suppressed": dict(alert.suppressed),
            },
        )


class SlackChannel:
    """An incoming webhook of Slack, which answers ``ok``."""

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, alert: Alert) -> None:
        answer = post_json(self._url, {"text": plain_message(alert, SLACK_BYTES)})
        if answer.strip() != b"ok":
            raise DeliveryError("the server did not answer ok", is_final=True)


class SignedChannel:
    """A bot of a chat service, which signs its messages with the time if it has a secret.

    Args:
        clock: returns the seconds since 1970.
    """

    def __init__(
        self,
        url: str,
        secret: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url = url
        self._secret = secret
        self._clock = clock


class FeishuChannel(SignedChannel):
    """A custom bot of Feishu, with a signature if it asks for one.

    InternEvo sends the same kind of message: a post with a title and one paragraph.
    """

    def send(self, alert: Alert) -> None:
        message = _feishu_post(alert)
        if self._secret is not None:
            timestamp = str(int(self._clock()))
            # Feishu signs an empty message with this text as the key.
            key = f"{timestamp}\n{self._secret}"
            message["timestamp"] = timestamp
            message["sign"] = _signature(key, "")
        answer = post_json(self._url, message)
        require_code_zero(answer, ("code", "StatusCode"))


def _feishu_post(alert: Alert) -> dict[str, Any]:
    """Return a post with the alert's title and its text as one paragraph."""
    text = shortened(alert.body, FEISHU_BYTES)
    element = {"tag": "text", "text": text}
    post = {"title": alert.title, "content": [[element]]}
    return {
        "msg_type": "post",
        "content": {"post": {"zh_cn": post}},
    }


class DingTalkChannel(SignedChannel):
    """A custom robot of DingTalk, with a signature in the URL if it asks for one."""

    def send(self, alert: Alert) -> None:
        text = plain_message(alert, DINGTALK_BYTES)
        message = {"msgtype": "text", "text": {"content": text}}
        answer = post_json(self._signed_url(), message)
        require_code_zero(answer, ("errcode",))

    def _signed_url(self) -> str:
        if self._secret is None:
            return self._url
        timestamp = str(round(1000 * self._clock()))
        signature = _signature(self._secret, f"{timestamp}\n{self._secret}")
        separator = "&" if "?" in self._url else "?"
        query = f"timestamp={timestamp}&sign={quote_plus(signature)}"
        return f"{self._url}{separator}{query}"


class WeComChannel:
    """A group robot of WeCom."""

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, alert: Alert) -> None:
        text = plain_message(alert, WECOM_BYTES)
        message = {"msgtype": "text", "text": {"content": text}}
        answer = post_json(self._url, message)
        require_code_zero(answer, ("errcode",))


def require_code_zero(answer: bytes, names: tuple[str, ...]) -> None:
    """Accept an answer such as ``{"code": 0}``: these services report their errors with HTTP 200.

    Args:
        names: fields that may hold the code; one of them must be present.

    Raises:
        DeliveryError: another code, or an answer of something else, such as a proxy's page.
    """
    try:
        fields = json.loads(answer)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise DeliveryError("the answer is not the service's")
    codes = [fields[name] for name in names if name in fields]
    if not codes:
        raise DeliveryError("the answer is not the service's")
    if any(code != 0 for code in codes):
        # The service's sentence may repeat a token; the number is enough to look it up.
        code = next(code for code in codes if code != 0)
        number = code if isinstance(code, int) else "unknown"
        raise DeliveryError(f"the service refused it with code {number}", is_final=True)


def _signature(key: str, message: str) -> str:
    digest = hmac.new(key.encode(), message.encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode("ascii")
