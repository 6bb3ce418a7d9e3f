"""Each channel against a server of this machine: what it sends, and which answers are failures."""

from __future__ import annotations

import base64
import hashlib
import hmac
import socket
from urllib.parse import parse_qs, urlsplit

import pytest

from evomesh.config.redact import REDACTED
from evomesh.errors import UserError
from evomesh.monitor.alerts import http
from evomesh.monitor.alerts.alert import Alert
from evomesh.monitor.alerts.channels import AlertChannel, build_channel
from evomesh.monitor.alerts.chat import WECOM_BYTES, DingTalkChannel, FeishuChannel
from evomesh.monitor.alerts.http import DeliveryError
from tests.support.webhook import MailServer, WebhookServer

ALERT = Alert(
    kind="loss spike",
    text="the loss of step 7 is 9.0000",
    job="42_tiny",
    host="node1",
    time="2026-01-31T12:00:00+00:00",
    suppressed={"loss spike": 3},
)
SERVICES = ("feishu", "dingtalk", "wecom")
SECRET_PATH = "/hook/T0pSecret"


def channel(kind: str, url: str) -> AlertChannel:
    return build_channel("channels[0]", {"type": kind, "url": url}, {})


def failure(kind: str, url: str) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        channel(kind, url).send(ALERT)
    assert "T0pSecret" not in str(caught.value)
    return caught.value


def test_a_webhook_gets_the_fields_of_the_alert() -> None:
    with WebhookServer((204, b"")) as server:
        channel("webhook", server.url + SECRET_PATH).send(ALERT)
    assert server.received == [
        (
            SECRET_PATH,
            {
                "job": "42_tiny",
                "kind": "loss spike",
                "text": "the loss of step 7 is 9.0000",
                "host": "node1",
                "time": "2026-01-31T12:00:00+00:00",
                "suppressed": {"loss spike": 3},
            },
        )
    ]


def test_feishu_gets_a_post_with_title_and_paragraph() -> None:
    with WebhookServer() as server:
        channel("feishu", server.url).send(ALERT)
    (document,) = server.documents
    post = document["content"]["post"]["zh_cn"]
    assert document["msg_type"] == "post"
    assert post["title"] == "[42_tiny] loss spike"
    ((paragraph,),) = post["content"]
    assert paragraph["tag"] == "text"
    assert paragraph["text"].splitlines() == [
        "the loss of step 7 is 9.0000",
        "(3 more alerts of kind 'loss spike' not sent)",
        "node1, 2026-01-31T12:00:00+00:00",
    ]


@pytest.mark.parametrize("kind", ["slack", "dingtalk", "wecom"])
def test_chat_services_get_one_text(kind: str) -> None:
    with WebhookServer((200, b"ok" if kind == "slack" else b'{"errcode":0}')) as server:
        channel(kind, server.url).send(ALERT)
    (document,) = server.documents
    text = document["text"] if kind == "slack" else document["text"]["content"]
    assert text.startswith("[42_tiny] loss spike\nthe loss of step 7 is 9.0000\n")


def test_signatures_are_those_of_the_services() -> None:
    """HMAC-SHA256: Feishu's key is time and secret, DingTalk's message is."""
    with WebhookServer() as server:
        FeishuChannel(server.url, "abc", lambda: 1700000000.5).send(ALERT)
        DingTalkChannel(server.url + "/?access_token=x", "abc", lambda: 1.5).send(ALERT)
    (_, feishu), (path, _) = server.received

    def signed(key: bytes, message: bytes) -> str:
        return base64.b64encode(hmac.digest(key, message, hashlib.sha256)).decode()

    assert feishu["timestamp"] == "1700000000"
    assert feishu["sign"] == signed(b"1700000000\nabc", b"")
    query = parse_qs(urlsplit(path).query)
    assert query["access_token"] == ["x"]
    assert query["timestamp"] == ["1500"]
    assert query["sign"] == [signed(b"abc", b"1500\nabc")]


@pytest.mark.parametrize("kind", SERVICES)
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"code": 19024, "errcode": 300001, "msg": "T0pSecret"}', "refused it with"),
        (b'{"msg": "fine"}', "not the service's"),
        (b"<html>log in</html>", "not the service's"),
        (b"[0]", "not the service's"),
        (b"", "not the service's"),
    ],
)
def test_an_error_in_a_200_is_a_failure(kind: str, body: bytes, words: str) -> None:
    with WebhookServer((200, body)) as server:
        assert words in str(failure(kind, server.url + SECRET_PATH))


def test_slack_answers_ok() -> None:
    with WebhookServer((200, b"invalid_token")) as server:
        assert "did not answer ok" in str(failure("slack", server.url))


@pytest.mark.parametrize(
    ("status", "is_final"), [(500, False), (429, False), (404, True), (302, True)]
)
def test_another_status_is_a_failure(status: int, is_final: bool) -> None:
    """A redirect too: followed as a GET, it would lose the message and look like a success."""
    with WebhookServer((status, b"")) as server:
        server.location = "/elsewhere"
        error = failure("webhook", server.url + SECRET_PATH)
    assert str(error) == f"the server answered {status}"
    assert error.is_final == is_final
    assert len(server.received) == 1


def test_a_connection_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"http://127.0.0.1:{port}{SECRET_PATH}"
    assert str(failure("webhook", url)) == "Connection refused"
    with WebhookServer(None) as server:
        error = failure("webhook", server.url + SECRET_PATH)
        assert "closed the connection without an answer" in str(error)
    with WebhookServer() as server:
        server.gate.clear()
        with pytest.raises(DeliveryError, match="no answer in time"):
            http.post_json(server.url + SECRET_PATH, {}, timeout=0.05)


def test_long_texts_are_shortened_to_what_a_service_takes() -> None:
    long = Alert("crash", "错" * 5000, "job", "host", "now", {})
    with WebhookServer() as server:
        channel("wecom", server.url).send(long)
    text = server.documents[0]["text"]["content"]
    assert len(text.encode()) <= WECOM_BYTES
    assert text.endswith("错...")


MAIL = {"type": "email", "sender": "a@b.c", "to": ["x@y.z", "v@w.x"]}


def test_mail_has_subject_receivers_and_text() -> None:
    with MailServer() as server:
        options = {**MAIL, "server": server.address, "security": "none"}
        alert = Alert("crash", "rank 3 is gone", "job\nBcc: all@b.c", "h", "now", {})
        build_channel("email", options, {}).send(alert)
    (mail,) = server.mails
    assert "Subject: [job Bcc: all@b.c] crash\r\n" in mail
    assert "To: x@y.z, v@w.x\r\n" in mail
    assert "rank 3 is gone" in mail
    receivers = [line for line in server.commands if line.startswith("rcpt")]
    assert receivers == ["rcpt TO:<x@y.z>", "rcpt TO:<v@w.x>"]


@pytest.mark.parametrize(
    ("replies", "more", "words", "is_final"),
    [
        ({"MAIL": "451 later"}, {}, "answered 451", False),
        ({"": "554 go away"}, {}, "answered 554", True),
        ({"RCPT": "550 unknown T0pSecret"}, {}, "refused the receivers", False),
        ({}, {"security": "starttls"}, "does not support", False),
        ({}, {"user": "u", "password": "T0pSecret"}, "does not support", False),
    ],
)
def test_mail_that_is_refused_is_a_failure(
    replies: dict[str, str], more: dict[str, str], words: str, is_final: bool
) -> None:
    with MailServer(replies) as server:
        options = {**MAIL, "server": server.address, "security": "none", **more}
        with pytest.raises(DeliveryError, match=words) as caught:
            build_channel("email", options, {}).send(ALERT)
    assert caught.value.is_final == is_final
    assert "T0pSecret" not in str(caught.value)


class Recorder:
    """A custom channel."""

    def __init__(self, token: str, room: int = 1) -> None:
        self.token, self.room = token, room

    def send(self, alert: Alert) -> None:
        pass


def test_custom_channels_get_their_options_with_secrets_of_the_environment() -> None:
    options = {"type": f"{__name__}:Recorder", "token": "env:ROOM_TOKEN", "room": 3}
    made = build_channel("channels[0]", options, {"ROOM_TOKEN": "abc"})
    assert type(made).__name__ == "Recorder"
    assert vars(made) == {"token": "abc", "room": 3}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "no_such_module:Channel"}, "No module named 'no_such_module'"),
        ({"type": "json:Channel"}, "has no attribute 'Channel'"),
        ({"type": "json:loads", "s": "1"}, "without a method send"),
        ({"type": "json:loads", "wrong": 1}, "cannot be made: TypeError"),
        ({"type": "slack", "url": "env:NOT_SET"}, "NOT_SET is not set"),
        ({"type": "slack", "url": "env:FTP"}, "does not begin with http"),
        ({"type": "slack", "url": REDACTED}, "does not contain this secret"),
    ],
)
def test_a_channel_that_cannot_be_made_is_one_message(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_channel("channels[0]", options, {"FTP": "ftp://T0pSecret"})
    assert caught.value.where.startswith("channels[0]")
    assert "T0pSecret" not in str(caught.value)
